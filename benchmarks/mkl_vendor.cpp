// Preloaded in front of MKL's own definition: MKL then takes its fast bf16 and AVX-512 kernels on any vendor's
// processor.  A diagnosis of what torch could reach, never something to ship.
extern "C" int mkl_serv_intel_cpu_true() { return 1; }
