#include "emulation/report.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <sstream>

namespace attn_ext::emulation {
namespace {

struct Entry {
  std::string message;
  long count = 0;
};
std::map<std::pair<std::string, Site>, Entry> entries;

std::string output_of(const std::string& command) {
  std::string output;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[4096];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) output.append(buffer, n);
    pclose(pipe);
  }
  return output;
}

}  // namespace

void report(const char* kind, Site site, const char* format, ...) {
  Entry& entry = entries[{kind, site}];
  if (entry.count++) return;
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  entry.message = message;
}

int report_count() { return static_cast<int>(entries.size()); }

std::string report_text() {
  std::vector<Site> sites;
  for (const auto& [key, entry] : entries) sites.push_back(key.second);
  const std::vector<std::string> lines = source_lines(sites);
  std::string text;
  size_t i = 0;
  for (const auto& [key, entry] : entries) {
    text += key.first + ": " + entry.message + ", " + std::to_string(entry.count) + " times";
    if (key.second) text += ", at " + lines[i];
    text += "\n";
    i++;
  }
  return text;
}

void clear_reports() { entries.clear(); }

std::vector<std::string> source_lines(const std::vector<Site>& sites) {
  std::vector<std::string> lines(sites.size(), "?");
  Dl_info image;
  if (sites.empty() || !dladdr(reinterpret_cast<void*>(&report), &image)) return lines;
  std::string command = std::string("addr2line -a -s -i -e '") + image.dli_fname + "'";
  for (const Site site : sites) {
    char address[32];
    // Of the call itself, not of what follows it.
    snprintf(address, sizeof address, " %#lx", site ? site - 1 - reinterpret_cast<uintptr_t>(image.dli_fbase) : 0);
    command += address;
  }
  // An address, then a line for each function inlined there.
  std::istringstream output(output_of(command));
  size_t found = 0;
  for (std::string text; std::getline(output, text);) {
    text.resize(std::min(text.size(), text.find(" (discriminator")));
    if (text.starts_with("0x")) {
      lines[found++] = "";
    } else if (!text.starts_with("emulator.h:")) {
      lines[found - 1] += (lines[found - 1].empty() ? "" : " < ") + text;
    }
  }
  return lines;
}

bool same_place(Site a, Site b) {
  if (a == b) return true;
  static std::map<std::pair<Site, Site>, bool> known;
  const auto [place, unknown] = known.try_emplace({a, b});
  if (unknown) {
    const std::vector<std::string> lines = source_lines({a, b});
    place->second = lines[0] == lines[1];
  }
  return place->second;
}

}  // namespace attn_ext::emulation
