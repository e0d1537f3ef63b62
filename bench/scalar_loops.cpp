// The algorithms of the detection ops as straightforward scalar loops: baselines of the benchmarks, not part of pyops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// A point between four pixels: where they are in a plane, and the weight of each.
struct Sample {
  int64_t at[4];
  float w[4];
};

// Of one RoI [5] in pixels, g samples per bin and axis, not aligned: [P, P, g, g].
std::vector<Sample> samples_of(const float* box, int64_t H, int64_t W, int64_t P, int64_t g) {
  std::vector<Sample> samples(P * P * g * g);
  const float height = std::max(box[4] - box[2], 1.0f) / P, width = std::max(box[3] - box[1], 1.0f) / P;
  int64_t k = 0;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t q = 0; q < P; ++q)
      for (int64_t i = 0; i < g; ++i)
        for (int64_t j = 0; j < g; ++j) {
          float v = box[2] + p * height + (i + 0.5f) * height / g, u = box[1] + q * width + (j + 0.5f) * width / g;
          Sample& s = samples[k++];
          if (v < -1 || v > H || u < -1 || u > W) continue;
          v = std::max(v, 0.0f);
          u = std::max(u, 0.0f);
          const int64_t v0 = std::min<int64_t>(v, H - 1), u0 = std::min<int64_t>(u, W - 1);
          const int64_t v1 = std::min(v0 + 1, H - 1), u1 = std::min(u0 + 1, W - 1);
          const float tv = v1 == v0 ? 0 : v - v0, tu = u1 == u0 ? 0 : u - u0;
          s = {{v0 * W + u0, v0 * W + u1, v1 * W + u0, v1 * W + u1},
               {(1 - tv) * (1 - tu), (1 - tv) * tu, tv * (1 - tu), tv * tu}};
        }
  return samples;
}

}  // namespace

extern "C" {

// boxes [n, 4] by falling score; returns how many are kept.
int64_t scalar_nms(const float* boxes, int64_t n, double threshold, int64_t* keep) {
  std::vector<float> area(n);
  std::vector<char> dead(n, 0);
  for (int64_t i = 0; i < n; ++i) area[i] = (boxes[4 * i + 2] - boxes[4 * i]) * (boxes[4 * i + 3] - boxes[4 * i + 1]);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (dead[i]) continue;
    keep[count++] = i;
    const float* a = boxes + 4 * i;
    for (int64_t j = i + 1; j < n; ++j) {
      if (dead[j]) continue;
      const float* b = boxes + 4 * j;
      const float w = std::max(0.0f, std::min(a[2], b[2]) - std::max(a[0], b[0]));
      const float h = std::max(0.0f, std::min(a[3], b[3]) - std::max(a[1], b[1]));
      const float inter = w * h;
      if (inter / (area[i] + area[j] - inter) > threshold) dead[j] = 1;
    }
  }
  return count;
}

// x [N, C, H, W], rois [R, 5] in pixels, g samples per bin and axis, not aligned; y [R, C, P, P].
void scalar_roi_align(const float* x, const float* rois, float* y, int64_t C, int64_t H, int64_t W, int64_t R,
                      int64_t P, int64_t g) {
  for (int64_t r = 0; r < R; ++r) {
    const std::vector<Sample> samples = samples_of(rois + 5 * r, H, W, P, g);
    for (int64_t c = 0; c < C; ++c) {
      const float* plane = x + (int64_t(rois[5 * r]) * C + c) * H * W;
      for (int64_t bin = 0; bin < P * P; ++bin) {
        float sum = 0;
        for (int64_t i = 0; i < g * g; ++i) {
          const Sample& s = samples[bin * g * g + i];
          for (int t = 0; t < 4; ++t) sum += s.w[t] * plane[s.at[t]];
        }
        y[(r * C + c) * P * P + bin] = sum / (g * g);
      }
    }
  }
}

// dx [N, C, H, W], zeros before, of dy [R, C, P, P].
void scalar_roi_align_backward(float* dx, const float* rois, const float* dy, int64_t C, int64_t H, int64_t W,
                               int64_t R, int64_t P, int64_t g) {
  for (int64_t r = 0; r < R; ++r) {
    const std::vector<Sample> samples = samples_of(rois + 5 * r, H, W, P, g);
    for (int64_t c = 0; c < C; ++c) {
      float* plane = dx + (int64_t(rois[5 * r]) * C + c) * H * W;
      for (int64_t bin = 0; bin < P * P; ++bin) {
        const float share = dy[(r * C + c) * P * P + bin] / (g * g);
        for (int64_t i = 0; i < g * g; ++i) {
          const Sample& s = samples[bin * g * g + i];
          for (int t = 0; t < 4; ++t) plane[s.at[t]] += s.w[t] * share;
        }
      }
    }
  }
}

}  // extern "C"
