// The second pass of attention: merge the splits of kernels/attend.metal and turn the sum of packed values back.
//
// Inputs
//   sums     (B * H * L, splits, D + 2) float32   each split's weighted sum (the last `raw` splits' are not rotated),
//            largest score in units of log 2, sum of weights
//   table    float32: as in attend.metal
//   logits   (H,) float                       attention-sink logits, one more term of the sum; not read unless LOGITS
//   sizes    int32: splits, raw splits
// Output
//   out      (B, H, L, D) T
// Template constants: T, D, H, L, VB (0: packed values are raw, nothing to turn), LOGITS, NSG (simdgroups)
// Grid: x: B * H * L; 32 * NSG threads. Splits: at most 512.
//
// Simdgroup s adds every NSG-th split; the first then adds the simdgroups, turns the row back and divides.

constant constexpr float LOG2E = 1.44269504088896f;
constant constexpr int MAX_SPLITS = 512;

// ==== body ====
  constexpr int E = (D + 31) / 32;
  threadgroup float weights[MAX_SPLITS];
  threadgroup float parts[2 * NSG * E * 32];
  threadgroup float totals[NSG];

  uint tid = thread_index_in_threadgroup;
  uint sg = simdgroup_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup;
  uint row = threadgroup_position_in_grid.x;
  uint splits = uint(sizes[0]), packed = splits - uint(sizes[1]);
  const device float* signs = table + 8;
  const device float* hartley = signs + D;
  const device float* row_sums = sums + ulong(row) * splits * (D + 2);

  // The first sums are on their way while the weights are computed.
  constexpr int AHEAD = 4;
  float ahead[AHEAD][E];
#pragma unroll
  for (int k = 0; k < AHEAD; k++) {
    uint s = sg + uint(k) * NSG;
#pragma unroll
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      ahead[k][e] = s < splits && i < uint(D) ? row_sums[s * (D + 2) + i] : 0.0f;
    }
  }

  float top = -1e30f;
  for (uint s = lane; s < splits; s += 32) { top = max(top, row_sums[s * (D + 2) + D]); }
  top = simd_max(top);
  float logit = 0.0f;
  if (LOGITS) {
    logit = float(logits[row / uint(L) % uint(H)]) * LOG2E;
    top = max(top, logit);
  }
  float total = 0.0f;
  for (uint s = tid; s < splits; s += 32 * NSG) {
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
  for (int k = 0; k < AHEAD; k++) {
    uint s = sg + uint(k) * NSG;
    float f = s < splits ? weights[s % MAX_SPLITS] : 0.0f;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (s < packed) { sum[e] += f * ahead[k][e]; } else { raw_sum[e] += f * ahead[k][e]; }
    }
  }
  for (uint s = sg + AHEAD * NSG; s < splits; s += NSG) {
    float f = weights[s];
#pragma unroll
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      float x = i < uint(D) ? f * row_sums[s * (D + 2) + i] : 0.0f;
      if (s < packed) { sum[e] += x; } else { raw_sum[e] += x; }
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
    for (int e = 0; e < E; e++) {
      sum[e] = raw_sum[e] = 0.0f;
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
        out[ulong(row) * D + i] = T(total > 0.0f ? x / total : 0.0f);
      }
    }
  }
