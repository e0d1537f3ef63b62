// From an instruction to the kernel's own file and line, through binutils' addr2line where it is installed.
#include <dlfcn.h>
#include <unwind.h>

#include <cstdio>
#include <cstring>

#include "emulator/engine.h"

namespace pyops::emulator {
namespace {

// Frames of the vocabulary and the engine are not where the bug is.
bool is_kernel_code(const std::string& file) {
  return file.find("/csrc/emulator/") == std::string::npos && file.find("csrc/cuda/device/") == std::string::npos &&
         file.find("/include/") == std::string::npos && file.rfind("??", 0) != 0;
}

// "file:line" of the innermost kernel frame at the address, inlined frames included; empty if there is none.
std::string kernel_line(const char* library, uintptr_t offset) {
  char command[1200];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", library, static_cast<size_t>(offset));
  FILE* output = popen(command, "r");
  if (output == nullptr) return "";
  std::string found;
  char line[1200];
  while (fgets(line, sizeof line, output) != nullptr) {
    std::string text = line;
    text = text.substr(0, text.find_first_of(" \n"));  // drops "(discriminator n)"
    if (!found.empty() || !is_kernel_code(text)) continue;
    const size_t slash = text.rfind('/');
    found = slash == std::string::npos ? text : text.substr(slash + 1);
  }
  pclose(output);
  return found;
}

std::string innermost_kernel_line(const void* const* pcs, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    Dl_info info;
    if (dladdr(pcs[i], &info) == 0) continue;
    const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    // A return address stands after its call: step back into it.
    const uintptr_t offset = reinterpret_cast<uintptr_t>(pcs[i]) - base - 1;
    const std::string line = kernel_line(info.dli_fname, offset);
    if (!line.empty()) return line;
  }
  return "";
}

struct Trace {
  const void* pcs[48];
  size_t count = 0;
};
Trace backtrace() {
  Trace trace;
  _Unwind_Backtrace(
      [](_Unwind_Context* context, void* argument) {
        auto* t = static_cast<Trace*>(argument);
        const auto pc = reinterpret_cast<const void*>(_Unwind_GetIP(context));
        if (pc == nullptr || t->count == sizeof t->pcs / sizeof *t->pcs) return _URC_END_OF_STACK;
        t->pcs[t->count++] = pc;
        return _URC_NO_REASON;
      },
      &trace);
  return trace;
}

}  // namespace

std::string locate(const void* pc) {
  // The access may stand in a vocabulary function that was not inlined: then its caller is the place to name.
  std::string line = innermost_kernel_line(&pc, 1);
  if (!line.empty()) return " at " + line;
  const std::string caller = locate_caller();
  if (!caller.empty()) return caller;
  Dl_info info;
  if (dladdr(pc, &info) == 0) return "";
  const char* slash = std::strrchr(info.dli_fname, '/');
  char text[300];
  snprintf(text, sizeof text, " at %s+0x%zx", slash != nullptr ? slash + 1 : info.dli_fname,
           static_cast<size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)));
  return text;
}

std::string locate_caller() {
  const Engine* e = engine();
  if (e == nullptr || e->current == nullptr) return "";
  const Trace trace = backtrace();
  const std::string line = innermost_kernel_line(trace.pcs, trace.count);
  return line.empty() ? "" : " at " + line;
}

}  // namespace pyops::emulator
