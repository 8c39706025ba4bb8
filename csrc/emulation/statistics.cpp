#include "emulation/statistics.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <vector>

#include "emulation/report.h"
#include "emulation/scheduler.h"

namespace attn_ext::emulation {

Counters counters;

namespace {

struct Launch {
  std::string name;
  dim3 grid, dim;
  size_t dynamic_bytes;
  Counters counters;
};
std::vector<Launch> launches;

// One site may be both: cp.async reads global and writes shared memory.
struct Key {
  Site site;
  Space space;
  bool write;
  auto operator<=>(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    return key.site * 4 + static_cast<size_t>(key.space) * 2 + static_cast<size_t>(key.write);
  }
};
struct Totals {
  size_t launch = 0;  // the first that came here
  int bytes = 0;
  long requests = 0, lanes = 0, transactions = 0, ideal = 0;
};
std::map<Key, Totals> totals;

struct Request {
  int lanes = 0;
  uintptr_t address[kLanes] = {};  // 0: the lane took no part
};
// Of one warp at one place since its lanes met; the n-th executions are request n.
struct Requests {
  Key key;
  int bytes = 0;
  int executions[kLanes] = {};
  size_t count = 0;
  std::vector<Request> request;  // the first `count`: the others are room
};
std::unordered_map<Key, Requests, KeyHash> requests_of[kMaxWarps];
std::vector<Requests*> open_requests[kMaxWarps];  // those with a count

void count_wavefronts(const Request& request, int bytes, Totals& sum) {
  const int words = std::max(1, bytes / 4), lanes_together = kLanes / words;
  for (int first = 0; first < kLanes; first += lanes_together) {
    uintptr_t word[kLanes];
    uintptr_t* end = word;
    for (int lane = first; lane < first + lanes_together; lane++) {
      if (!request.address[lane]) continue;
      for (int w = 0; w < words; w++) *end++ = request.address[lane] / 4 + static_cast<uintptr_t>(w);
    }
    if (end == word) continue;
    std::sort(word, end);
    end = std::unique(word, end);
    int in_bank[kLanes] = {}, most = 0;
    for (const uintptr_t* w = word; w < end; w++) most = std::max(most, ++in_bank[*w % kLanes]);
    sum.transactions += most;
    sum.ideal++;
  }
}

void count_sectors(const Request& request, int bytes, Totals& sum) {
  uintptr_t sector[2 * kLanes];
  uintptr_t* end = sector;
  for (const uintptr_t address : request.address) {
    if (!address) continue;
    *end++ = address / 32;
    *end++ = (address + static_cast<uintptr_t>(bytes) - 1) / 32;
  }
  std::sort(sector, end);
  sum.transactions += std::unique(sector, end) - sector;
  sum.ideal += (request.lanes * bytes + 31) / 32;
}

std::string field(const char* name, const std::string& value) { return "\"" + std::string(name) + "\": " + value; }
std::string field(const char* name, long value) { return field(name, std::to_string(value)); }
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) out += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return out + "\"";
}
std::string list(const dim3& d) {
  return "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
}
std::string object(const std::vector<std::string>& fields) {
  std::string out;
  for (const std::string& f : fields) out += (out.empty() ? "{" : ", ") + f;
  return out + "}";
}
std::string array(const std::vector<std::string>& items) {
  std::string out = "[";
  for (const std::string& item : items) out += (out.size() > 1 ? ",\n  " : "\n  ") + item;
  return out + "]";
}

std::string json(const Launch& launch) {
  const Counters& c = launch.counters;
  return object(
      {field("kernel", quoted(launch.name)), field("grid", list(launch.grid)), field("block", list(launch.dim)),
       field("dynamic_shared_bytes", static_cast<long>(launch.dynamic_bytes)), field("mma_m16n8k16", c.mma_m16n8k16),
       field("mma_m16n8k8", c.mma_m16n8k8), field("ldmatrix", c.ldmatrix), field("shuffles", c.shuffles),
       field("votes", c.votes), field("reductions", c.reductions), field("barriers", c.barriers), field("sfu", c.sfu),
       field("cp_async", c.cp_async), field("cp_async_bytes", c.cp_async_bytes), field("atomics", c.atomics)});
}
std::string json(const Key& key, const Totals& sum, const std::string& line) {
  const bool shared = key.space == Space::shared;
  return object({field("kernel", quoted(launches[sum.launch].name)), field("where", quoted(line)),
                 field("space", quoted(shared ? "shared" : "global")),
                 field("operation", quoted(key.write ? "write" : "read")), field("bytes", sum.bytes),
                 field("requests", sum.requests), field("lanes", sum.lanes),
                 field(shared ? "wavefronts" : "sectors", sum.transactions), field("ideal", sum.ideal)});
}

void end_launch() {
  if (!launches.empty()) launches.back().counters = counters;
}

}  // namespace

void start_statistics(const char* kernel_name) {
  end_launch();
  counters = {};
  launches.push_back({kernel_name, block.grid, block.dim, block.dynamic_bytes, {}});
}

void count_access(uintptr_t address, int bytes, Space space, bool write, Site site) {
  if (!configuration.access_sites) return;
  const int warp = current->warp;
  const Key key{site, space, write};
  const auto [place, first] = requests_of[warp].try_emplace(key);
  Requests& requests = place->second;
  if (first) requests.key = key;
  if (!requests.count) open_requests[warp].push_back(&requests);
  requests.bytes = bytes;
  const auto n = static_cast<size_t>(requests.executions[current->lane]++);
  requests.count = std::max(requests.count, n + 1);
  if (n >= requests.request.size()) requests.request.resize(n + 1);
  requests.request[n].lanes++;
  requests.request[n].address[current->lane] = address;
}

void accesses_complete(int warp) {
  for (Requests* const requests : open_requests[warp]) {
    const auto [place, first] = totals.try_emplace(requests->key);
    Totals& sum = place->second;
    if (first) sum.launch = launches.size() - 1;
    sum.bytes = requests->bytes;
    for (size_t n = 0; n < requests->count; n++) {
      Request& request = requests->request[n];
      sum.requests++;
      sum.lanes += request.lanes;
      requests->key.space == Space::shared ? count_wavefronts(request, sum.bytes, sum)
                                           : count_sectors(request, sum.bytes, sum);
      request = {};
    }
    requests->count = 0;
    std::fill_n(requests->executions, kLanes, 0);
  }
  open_requests[warp].clear();
}

void clear_statistics() {
  launches.clear();
  totals.clear();
  counters = {};
}

std::string statistics_json() {
  end_launch();
  std::vector<std::string> launch_items, site_items;
  for (const Launch& launch : launches) launch_items.push_back(json(launch));
  std::vector<Site> sites;
  for (const auto& [key, sum] : totals) sites.push_back(key.site);
  const std::vector<std::string> lines = source_lines(sites);
  for (const auto& [key, sum] : totals) site_items.push_back(json(key, sum, lines[site_items.size()]));
  return "{" + field("launches", array(launch_items)) + ",\n" + field("sites", array(site_items)) + "}\n";
}

}  // namespace attn_ext::emulation
