// The factors that balance quantization noise between channels, from what queries and keys weigh; see conditioning.py.
//
// Inputs
//   queries  (B, Hkv, D) float32: sums of squares of the queries that read a head
//   keys     (B, Hkv, D) float32: sums of squares of its centred keys
// Outputs
//   factors  (B, Hkv, D) float32: (queries / keys)^(1/4), floored, with geometric mean 1; 1 where either is all 0
// Template: D, at most 256.
// Grid: (1, Hkv, B) threadgroups of one simdgroup, one for each head. Inputs have at least 8 numbers.
//
// As plain MLX operations these are 28 dispatches for each layer of a model, in the step in which a prompt is compressed.

#define FLOOR 1e-3f     // BALANCE_FLOOR of conditioning.py
#define SMALLEST 1e-37f
#define LARGEST 3.4e38f

// The logarithms of a lane's energies, as parts of the largest, with a share of their mean added; returns the largest.
template <int D> METAL_FUNC float log_floored(const device float* energies, uint lane, thread float* out) {
  constexpr int E = (D + 31) / 32;
  float top = 0.0f, mean = 0.0f;
#pragma unroll
  for (int e = 0; e < E; e++) {
    uint d = lane + 32 * uint(e);
    out[e] = d < uint(D) ? min(energies[d], LARGEST) : 0.0f;  // squares may have overflowed
    top = max(top, out[e]);
  }
  top = simd_max(top);
  float scale = max(top, SMALLEST);
#pragma unroll
  for (int e = 0; e < E; e++) {
    out[e] /= scale;
    mean += out[e];
  }
  mean = simd_sum(mean) / float(D);
#pragma unroll
  for (int e = 0; e < E; e++) { out[e] = log(max(out[e] + FLOOR * mean, SMALLEST)); }
  return top;
}

// ==== body ====
constexpr int E = (D + 31) / 32;
uint lane = thread_index_in_simdgroup;
ulong head = (ulong(threadgroup_position_in_grid.z) * threadgroups_per_grid.y + threadgroup_position_in_grid.y) * D;
float x[E], y[E];
float asked = log_floored<D>(queries + head, lane, x), there = log_floored<D>(keys + head, lane, y);
float mean = 0.0f;
#pragma unroll
for (int e = 0; e < E; e++) {
  x[e] = 0.25f * (x[e] - y[e]);
  mean += lane + 32 * uint(e) < uint(D) ? x[e] : 0.0f;
}
mean = simd_sum(mean) / float(D);
#pragma unroll
for (int e = 0; e < E; e++) {
  uint d = lane + 32 * uint(e);
  if (d < uint(D)) { factors[head + d] = min(asked, there) == 0.0f ? 1.0f : exp(x[e] - mean); }
}
