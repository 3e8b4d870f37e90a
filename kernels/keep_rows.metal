// Copy the rows that stay raw when blocks are encoded, of keys and values in one dispatch: first ones and newest ones.
//
// Inputs
//   keys     (B, Hkv, capacity, D) T, a whole buffer
//   values   (B, Hkv, capacity of its own, DV) T, a whole buffer
//   sizes    at least 8 int32: capacity of keys, capacity of values, first newest row, how many of them
// Outputs
//   new_k    (B, Hkv, ROOM, D) T: the newest keys, zeros behind them
//   new_v    (B, Hkv, ROOM, DV) T
//   first_k  (B, Hkv, SINKS, D) T: the first keys; 8 zeros if SINKS is 0
//   first_v  (B, Hkv, SINKS, DV) T
// Template: T float16_t, bfloat16_t or float. D and DV, multiples of 8. ROOM, at least as many as the newest rows. SINKS.
//   PART, rows for a threadgroup. THREADS.
// Grid: (2 * P, Hkv, B) threadgroups of THREADS, P = ROOM / PART rounded up: even ones copy keys, odd ones values; the
// first pair copies the first rows too. Buffers start at multiples of 16 bytes.

// `count` rows of N 16-byte pieces; zeros from row `valid` on.
template <int N, int THREADS>
METAL_FUNC void copy_rows(device uint4* to, const device uint4* from, uint count, uint valid, uint thread_) {
  for (uint i = thread_; i < count * uint(N); i += uint(THREADS)) {
    to[i] = i < valid * uint(N) ? from[i] : uint4(0u, 0u, 0u, 0u);
  }
}

template <typename T, int N, int ROOM, int SINKS, int PART, int THREADS>
METAL_FUNC void keep_side(
    device T* newest, device T* firsts, const device T* rows, ulong head, uint capacity, uint start, uint count,
    uint part, uint thread_) {
  constexpr int PIECES = N * int(sizeof(T)) / 16;
  const device T* source = rows + head * ulong(capacity) * N;
  uint first = part * uint(PART);
  copy_rows<PIECES, THREADS>(
      (device uint4*)(newest + (head * ROOM + first) * N), (const device uint4*)(source + ulong(start + first) * N),
      min(uint(ROOM) - first, uint(PART)), count > first ? count - first : 0u, thread_);
  if (SINKS == 0 && part == 0 && head == 0) {
    copy_rows<int(sizeof(T)) / 2, THREADS>((device uint4*)firsts, (const device uint4*)source, 1u, 0u, thread_);
  }
  if (SINKS > 0 && part == 0) {
    copy_rows<PIECES, THREADS>(
        (device uint4*)(firsts + head * SINKS * N), (const device uint4*)source, uint(SINKS), uint(SINKS), thread_);
  }
}

// ==== body ====
uint thread_ = thread_index_in_threadgroup;
uint part = threadgroup_position_in_grid.x / 2;
ulong head = ulong(threadgroup_position_in_grid.z) * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
if (threadgroup_position_in_grid.x % 2 == 0) {
  keep_side<T, D, ROOM, SINKS, PART, THREADS>(
      new_k, first_k, keys, head, uint(sizes[0]), uint(sizes[2]), uint(sizes[3]), part, thread_);
} else {
  keep_side<T, DV, ROOM, SINKS, PART, THREADS>(
      new_v, first_v, values, head, uint(sizes[1]), uint(sizes[2]), uint(sizes[3]), part, thread_);
}
