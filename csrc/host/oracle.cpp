// The norms in long double on NumPy arrays: the slow truth that tests hold kernels against, independent of torch.
//
// All four are one formula over different sets of elements. Seen as x[b, c, s] with an affine weight per channel c:
//   layer_norm, rms_norm   [M, N] = [b, c, 1]     one set per b
//   batch_norm             [N, C, S]              one set per c
//   group_norm             [N, C, S]              one set per (b, group of c)
//
//   mean = sum(x) / n      var = sum((x - mean)^2) / n      rstd = 1 / sqrt(var + eps)      (rms_norm: mean = 0)
//   xhat = (x - mean) * rstd      y = xhat * w + b
//   g = dy * w      dx = rstd * (g - sum(g)/n - xhat * sum(g * xhat)/n)                     (rms_norm: no sum(g) term)
//   dw = sum over b, s of dy * xhat      db = sum over b, s of dy
// An empty set has mean 0 and variance 0.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "host/oracle.h"

namespace py = pybind11;

namespace pyops::host {
namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;
using OptionalArray = std::optional<Array>;
using Values = std::vector<long double>;

struct Sets {
  int64_t B, C, S;     // x[b, c, s]
  int64_t count;       // number of sets
  int64_t size;        // elements per set
  int64_t batch_step;  // set of (b, c) = b * batch_step + c / channels_per_set
  int64_t channels_per_set;
  bool centred;
  std::vector<py::ssize_t> statistics_shape;

  int64_t set_of(int64_t b, int64_t c) const { return b * batch_step + c / channels_per_set; }

  // f(flat index, set, channel) over all elements.
  template <class F>
  void each(const F& f) const {
    for (int64_t b = 0, i = 0; b < B; ++b) {
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t s = 0; s < S; ++s) f(i++, set_of(b, c), c);
      }
    }
  }

  // Sums f over each set, divided by its size.
  template <class F>
  Values mean_of(const F& f) const {
    Values sums(static_cast<size_t>(count), 0.0L);
    each([&](int64_t i, int64_t set, int64_t c) { sums[set] += f(i, set, c); });
    for (long double& sum : sums) sum = size ? sum / static_cast<long double>(size) : 0.0L;
    return sums;
  }
};

std::vector<py::ssize_t> shape_of(const Array& array) { return {array.shape(), array.shape() + array.ndim()}; }

void expect(bool condition, const char* op, const std::string& what) {
  if (!condition) throw std::invalid_argument(std::string("_host.") + op + ": " + what);
}

Sets rows(const char* op, const Array& x, bool centred) {
  expect(x.ndim() == 2, op, "x must have shape [M, N], got rank " + std::to_string(x.ndim()));
  const int64_t M = x.shape(0), N = x.shape(1);
  return {M, N, 1, M, N, 1, std::max<int64_t>(N, 1), centred, {M}};
}

Sets channels(const char* op, const Array& x) {
  expect(x.ndim() == 3, op, "x must have shape [N, C, S], got rank " + std::to_string(x.ndim()));
  const int64_t N = x.shape(0), C = x.shape(1), S = x.shape(2);
  return {N, C, S, C, N * S, 0, 1, true, {C}};
}

Sets channel_groups(const char* op, const Array& x, int64_t groups) {
  expect(x.ndim() == 3, op, "x must have shape [N, C, S], got rank " + std::to_string(x.ndim()));
  const int64_t N = x.shape(0), C = x.shape(1), S = x.shape(2);
  expect(groups > 0 && C % groups == 0, op, "groups must divide C = " + std::to_string(C));
  const int64_t per_group = C / groups;
  return {N, C, S, N * groups, per_group * S, groups, std::max<int64_t>(per_group, 1), true, {N, groups}};
}

// Values of an optional affine vector of C entries; nullptr where it is absent.
const double* affine(const char* op, const char* name, const OptionalArray& array, int64_t C) {
  if (!array) return nullptr;
  expect(array->ndim() == 1 && array->shape(0) == C, op,
         std::string(name) + " must have shape [" + std::to_string(C) + "]");
  return array->data();
}

struct Statistics {
  Values mean, var, rstd;
};

Statistics statistics(const Sets& sets, const double* x, double eps) {
  Statistics result;
  result.mean = sets.centred ? sets.mean_of([&](int64_t i, int64_t, int64_t) -> long double { return x[i]; })
                             : Values(static_cast<size_t>(sets.count), 0.0L);
  result.var = sets.mean_of([&](int64_t i, int64_t set, int64_t) {
    const long double d = x[i] - result.mean[set];
    return d * d;
  });
  for (const long double var : result.var) result.rstd.push_back(1.0L / std::sqrt(var + static_cast<long double>(eps)));
  return result;
}

Array rounded(const Values& values, const std::vector<py::ssize_t>& shape) {
  Array array(shape);
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

struct Forward {
  Array y, mean, rstd, var;
};

Forward forward(const char* op, const Sets& sets, const Array& x, const OptionalArray& weight,
                const OptionalArray& bias, double eps) {
  const double *w = affine(op, "weight", weight, sets.C), *b = affine(op, "bias", bias, sets.C), *px = x.data();
  Array y(shape_of(x));
  double* out = y.mutable_data();
  Statistics stats;
  {
    const py::gil_scoped_release release;
    stats = statistics(sets, px, eps);
    sets.each([&](int64_t i, int64_t set, int64_t c) {
      const long double xhat = (px[i] - stats.mean[set]) * stats.rstd[set];
      out[i] = static_cast<double>(xhat * (w ? w[c] : 1.0L) + (b ? b[c] : 0.0L));
    });
  }
  const auto& shape = sets.statistics_shape;
  return {std::move(y), rounded(stats.mean, shape), rounded(stats.rstd, shape), rounded(stats.var, shape)};
}

struct Backward {
  Array dx, dw, db;
};

Backward backward(const char* op, const Sets& sets, const Array& dy, const Array& x, const OptionalArray& weight,
                  double eps) {
  expect(shape_of(dy) == shape_of(x), op, "dy must have the shape of x");
  const double *w = affine(op, "weight", weight, sets.C), *pdy = dy.data(), *px = x.data();
  Array dx(shape_of(x));
  double* pdx = dx.mutable_data();
  Values dw(static_cast<size_t>(sets.C), 0.0L), db(static_cast<size_t>(sets.C), 0.0L);
  {
    const py::gil_scoped_release release;
    const Statistics stats = statistics(sets, px, eps);
    const auto xhat = [&](int64_t i, int64_t set) { return (px[i] - stats.mean[set]) * stats.rstd[set]; };
    const auto g = [&](int64_t i, int64_t c) { return pdy[i] * (w ? static_cast<long double>(w[c]) : 1.0L); };
    const Values mean_g = sets.mean_of([&](int64_t i, int64_t, int64_t c) { return g(i, c); });
    const Values mean_gx = sets.mean_of([&](int64_t i, int64_t set, int64_t c) { return g(i, c) * xhat(i, set); });
    sets.each([&](int64_t i, int64_t set, int64_t c) {
      const long double centre = sets.centred ? mean_g[set] : 0.0L;
      pdx[i] = static_cast<double>(stats.rstd[set] * (g(i, c) - centre - xhat(i, set) * mean_gx[set]));
      dw[c] += pdy[i] * xhat(i, set);
      db[c] += pdy[i];
    });
  }
  return {std::move(dx), rounded(dw, {sets.C}), rounded(db, {sets.C})};
}

py::tuple layer_norm(const Array& x, const OptionalArray& weight, const OptionalArray& bias, double eps) {
  const Forward f = forward("layer_norm", rows("layer_norm", x, true), x, weight, bias, eps);
  return py::make_tuple(f.y, f.mean, f.rstd);
}
py::tuple layer_norm_backward(const Array& dy, const Array& x, const OptionalArray& weight, double eps) {
  const Backward b = backward("layer_norm_backward", rows("layer_norm_backward", x, true), dy, x, weight, eps);
  return py::make_tuple(b.dx, b.dw, b.db);
}

py::tuple rms_norm(const Array& x, const OptionalArray& weight, double eps) {
  const Forward f = forward("rms_norm", rows("rms_norm", x, false), x, weight, std::nullopt, eps);
  return py::make_tuple(f.y, f.rstd);
}
py::tuple rms_norm_backward(const Array& dy, const Array& x, const OptionalArray& weight, double eps) {
  const Backward b = backward("rms_norm_backward", rows("rms_norm_backward", x, false), dy, x, weight, eps);
  return py::make_tuple(b.dx, b.dw);
}

py::tuple batch_norm(const Array& x, const OptionalArray& weight, const OptionalArray& bias, double eps) {
  const Forward f = forward("batch_norm", channels("batch_norm", x), x, weight, bias, eps);
  return py::make_tuple(f.y, f.mean, f.rstd, f.var);
}
py::tuple batch_norm_backward(const Array& dy, const Array& x, const OptionalArray& weight, double eps) {
  const Backward b = backward("batch_norm_backward", channels("batch_norm_backward", x), dy, x, weight, eps);
  return py::make_tuple(b.dx, b.dw, b.db);
}

py::tuple group_norm(const Array& x, int64_t groups, const OptionalArray& weight, const OptionalArray& bias,
                     double eps) {
  const Forward f = forward("group_norm", channel_groups("group_norm", x, groups), x, weight, bias, eps);
  return py::make_tuple(f.y, f.mean, f.rstd, f.var);
}
py::tuple group_norm_backward(const Array& dy, const Array& x, int64_t groups, const OptionalArray& weight,
                              double eps) {
  const char* op = "group_norm_backward";
  const Backward b = backward(op, channel_groups(op, x, groups), dy, x, weight, eps);
  return py::make_tuple(b.dx, b.dw, b.db);
}

}  // namespace

void bind_oracle(py::module_& module) {
  using namespace pybind11::literals;
  const py::object none = py::none();
  module.def("layer_norm", &layer_norm, "x"_a, "weight"_a = none, "bias"_a = none, "eps"_a = 1e-5,
             "x[M, N] -> y[M, N], mean[M], rstd[M]; long double arithmetic, float64 results.");
  module.def("layer_norm_backward", &layer_norm_backward, "dy"_a, "x"_a, "weight"_a = none, "eps"_a = 1e-5,
             "dy, x[M, N] -> dx[M, N], dw[N], db[N]; statistics are recomputed from x.");
  module.def("rms_norm", &rms_norm, "x"_a, "weight"_a = none, "eps"_a = 1e-5, "x[M, N] -> y[M, N], rstd[M].");
  module.def("rms_norm_backward", &rms_norm_backward, "dy"_a, "x"_a, "weight"_a = none, "eps"_a = 1e-5,
             "dy, x[M, N] -> dx[M, N], dw[N].");
  module.def("batch_norm", &batch_norm, "x"_a, "weight"_a = none, "bias"_a = none, "eps"_a = 1e-5,
             "x[N, C, S] -> y[N, C, S], mean[C], rstd[C], var[C] (biased), statistics of this batch.");
  module.def("batch_norm_backward", &batch_norm_backward, "dy"_a, "x"_a, "weight"_a = none, "eps"_a = 1e-5,
             "dy, x[N, C, S] -> dx[N, C, S], dw[C], db[C].");
  module.def("group_norm", &group_norm, "x"_a, "groups"_a, "weight"_a = none, "bias"_a = none, "eps"_a = 1e-5,
             "x[N, C, S] -> y[N, C, S], mean[N, G], rstd[N, G], var[N, G]; instance norm is groups == C.");
  module.def("group_norm_backward", &group_norm_backward, "dy"_a, "x"_a, "groups"_a, "weight"_a = none, "eps"_a = 1e-5,
             "dy, x[N, C, S] -> dx[N, C, S], dw[C], db[C].");
}

}  // namespace pyops::host
