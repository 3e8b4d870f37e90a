// The second pass of attention: merge the splits of kernels/attend.metal and turn the sum of packed values back.
//
// Inputs
//   sums     (B * H * L, SPLITS, D + 2) float32   each split's weighted sum, largest score in units of log 2, sum of
//            weights; the sums of the last RAW splits are not rotated
//   logits   (H,) float     attention-sink logits, one more term of the sum; not read unless LOGITS
//   table    float32: as in attend.metal
// Output
//   out      (B, H, L, D) T
// Template constants
//   T, D, H, L, SPLITS (at most 512), RAW, VB (0: packed values are raw, nothing to turn), LOGITS, NSG (simdgroups)
// Grid: x: B * H * L; 32 * NSG threads.
//
// Simdgroup s adds every NSG-th split; the first then adds the simdgroups, turns the row back and divides.

constant constexpr float LOG2E = 1.44269504088896f;

// ==== body ====
  constexpr int E = (D + 31) / 32;
  constexpr int SHARE = (SPLITS + NSG - 1) / NSG;  // splits of a simdgroup
  constexpr int AHEAD = SHARE < 8 ? SHARE : 8;     // of which so many are fetched before anything is computed
  threadgroup float weights[SPLITS];
  threadgroup float parts[2 * NSG * E * 32];
  threadgroup float totals[NSG];

  uint tid = thread_index_in_threadgroup;
  uint sg = simdgroup_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup;
  uint row = threadgroup_position_in_grid.x;
  const device float* signs = table + 8;
  const device float* hartley = signs + D;
  const device float* row_sums = sums + ulong(row) * SPLITS * (D + 2);

  float ahead[AHEAD][E];
#pragma unroll
  for (int k = 0; k < AHEAD; k++) {
    uint s = sg + uint(k) * NSG;
#pragma unroll
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      ahead[k][e] = s < uint(SPLITS) && i < uint(D) ? row_sums[s * (D + 2) + i] : 0.0f;
    }
  }

  float top = -1e30f;
#pragma unroll
  for (int k = 0; k < SPLITS; k += 32) {
    uint s = uint(k) + lane;
    if (s < uint(SPLITS)) { top = max(top, row_sums[s * (D + 2) + D]); }
  }
  top = simd_max(top);
  float logit = 0.0f;
  if (LOGITS) {
    logit = float(logits[row / uint(L) % uint(H)]) * LOG2E;
    top = max(top, logit);
  }
  float total = 0.0f;
  for (uint s = tid; s < uint(SPLITS); s += 32 * NSG) {
    float f = fast::exp2(row_sums[s * (D + 2) + D] - top);
    weights[s] = f;
    total += f * row_sums[s * (D + 2) + D + 1];
  }
  total = simd_sum(total);
  if (lane == 0) { totals[sg] = total; }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float sum[E], raw_sum[E];
  for (int e = 0; e < E; e++) { sum[e] = raw_sum[e] = 0.0f; }
#pragma unroll
  for (int k = 0; k < SHARE; k++) {
    uint s = sg + uint(k) * NSG;
    float f = s < uint(SPLITS) ? weights[s % SPLITS] : 0.0f;
#pragma unroll
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      float x = k < AHEAD ? ahead[k % AHEAD][e]
                          : s < uint(SPLITS) && i < uint(D) ? row_sums[s * (D + 2) + i] : 0.0f;
      if (s < uint(SPLITS - RAW)) { sum[e] += f * x; } else { raw_sum[e] += f * x; }
    }
  }
  for (int e = 0; e < E; e++) {
    parts[(sg * E + e) * 32 + lane] = sum[e];
    parts[((NSG + sg) * E + e) * 32 + lane] = raw_sum[e];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (sg == 0) {
    total = LOGITS ? fast::exp2(logit - top) : 0.0f;
    for (uint s = 0; s < uint(NSG); s++) { total += totals[s]; }
#pragma unroll
    for (int e = 0; e < E; e++) {
      sum[e] = raw_sum[e] = 0.0f;
#pragma unroll
      for (uint s = 0; s < uint(NSG); s++) {
        sum[e] += parts[(s * E + e) * 32 + lane];
        raw_sum[e] += parts[((NSG + s) * E + e) * 32 + lane];
      }
    }
    if (VB > 0) { hadamard_hartley<D>(sum, hartley, lane); }
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      if (i < uint(D)) {
        float x = (VB > 0 ? sum[e] * signs[i] : sum[e]) + raw_sum[e];
        out[ulong(row) * D + i] = T(total > 0.0f ? within(x / total, (const device T*)out) : 0.0f);
      }
    }
  }
