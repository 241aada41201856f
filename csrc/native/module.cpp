// kdkernels._native: what this build is, what this CPU can do, how fast the machine is at best, and single kernels by ISA for
// microbenchmarks. It holds its own copy of the kernels and knows no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/isa.h"
#include "cpu/table.h"
#include "native/ceilings.h"
#include "native/raw.h"

namespace py = pybind11;

namespace kd::native {

namespace {

py::dict cpu_features() {
  const cpu::Features& f = cpu::features();
  py::dict out;
  out["avx2"] = f.avx2;
  out["fma"] = f.fma;
  out["f16c"] = f.f16c;
  out["avx512f"] = f.avx512f;
  out["avx512bw"] = f.avx512bw;
  out["avx512dq"] = f.avx512dq;
  out["avx512vl"] = f.avx512vl;
  out["avx512vnni"] = f.avx512vnni;
  out["avx512bf16"] = f.avx512bf16;
  out["amx_tile"] = f.amx_tile;
  out["amx_bf16"] = f.amx_bf16;
  out["amx_int8"] = f.amx_int8;
  return out;
}

py::dict isas() {
  py::dict out;
  for (int i = 0; i < cpu::num_candidates; ++i) out[cpu::candidates[i].name] = cpu::candidates[i].supported();
  return out;
}

std::string isa() {
  const cpu::Table* table = cpu::table();
  if (!table) throw std::runtime_error(cpu::isa_error());
  return table->isa;
}

py::dict build_info() {
  py::dict flags;
  flags["all"] = KD_FLAGS;
  flags["generic"] = KD_FLAGS_GENERIC;
  flags["avx2"] = KD_FLAGS_AVX2;
  flags["avx512"] = KD_FLAGS_AVX512;
  flags["amx"] = KD_FLAGS_AMX;
  py::dict out;
  out["version"] = KD_VERSION;
#if defined(__clang__)
  out["compiler"] = "clang " __clang_version__;
#else
  out["compiler"] = "gcc " __VERSION__;
#endif
  out["flags"] = flags;
  out["cuda_archs"] = KD_CUDA_ARCHS;
  out["sanitize"] = KD_SANITIZE;
  return out;
}

double measure_ceiling(const std::string& name, int threads, double seconds, int repeats, const std::string& isa) {
  if (threads < 0) throw std::invalid_argument("threads must be >= 0 (0: all), got " + std::to_string(threads));
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be in (0, 60]");
  if (repeats < 1) throw std::invalid_argument("repeats must be >= 1, got " + std::to_string(repeats));
  if (threads == 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  const Ceiling* chosen = nullptr;
  std::string known;
  for (const Ceiling& c : ceilings()) {
    known += std::string(known.empty() ? "" : ", ") + c.name + (*c.isa ? std::string("/") + c.isa : "");
    if (c.name == name && (isa.empty() || isa == c.isa) && c.available) chosen = &c;  // the best comes last
  }
  if (!chosen)
    throw std::invalid_argument("this CPU has no ceiling " + name + (isa.empty() ? "" : "/" + isa) + "; known: " + known);
  py::gil_scoped_release release;
  return measure(*chosen, threads, seconds, repeats);
}

py::dict all_ceilings(int threads, double seconds, int repeats) {
  py::dict out;
  for (const Ceiling& c : ceilings())
    if (c.available && !out.contains(c.name)) out[c.name] = measure_ceiling(c.name, threads, seconds, repeats, "");
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU features, build facts, machine ceilings and raw kernels; no torch.";
  m.def("cpu_features", &cpu_features, "{feature: whether this CPU and its operating system support it}");
  m.def("isas", &isas, "{ISA that this build has kernels for, best first: whether this CPU runs it}");
  m.def("isa", &isa, "The ISA that the CPU ops run on; raises RuntimeError if KDKERNELS_CPU_ISA asks for an impossible one.");
  m.def("isa_reason", &cpu::isa_reason, "Why that ISA.");
  m.def("build_info", &build_info, "{version, compiler, flags, cuda_archs (empty: built without nvcc), sanitize}");
  m.def("measure", &measure_ceiling, py::arg("name"), py::kw_only(), py::arg("threads") = 0, py::arg("seconds") = 0.1,
        py::arg("repeats") = 3, py::arg("isa") = "",
        "The best of `repeats` runs, in 1e9 per second: operations for fp32, fp64, bf16 and int8 (a multiply-add counts two), bytes "
        "for read and copy (copy counts reads and writes). threads 0: all. isa \"\": the best. ValueError: unknown, or not on this CPU.");
  m.def("ceilings", &all_ceilings, py::kw_only(), py::arg("threads") = 0, py::arg("seconds") = 0.1, py::arg("repeats") = 3,
        "{name: measure(name)} for all that this CPU has.");
  add_raw_kernels(m);
}

}  // namespace kd::native
