// Decode whole blocks of keys or values: codes to centroids, scales, rotation back, balance and centres undone.
//
// Inputs, whole buffers of which `count` rows from row `start` on are decoded
//   codes    (B, Hkv, code rows, W) uint32, as mlx_turboquant/packing.py packs
//   scales   (B, Hkv, scale rows, D / GROUP) T
//   centers  (B, Hkv, center rows, D) T, one row for each BLOCK rows; not read if not CENTER
//   factors  (D,) or (B, Hkv, D) float32: the rotation's signs, over the balance where there is one
//   hartley  at least 8 float32: the rotation's (ODD, ODD) matrix row by row, D = ODD * TWO; see rows.h
//   book     at least 8 float32: 2^BITS centroids
//   sizes    at least 8 int32: start, code rows, scale rows, center rows, elements from one head's factors to the next
// Outputs
//   out      (B, Hkv, count, D) T
// Template: T float16_t, bfloat16_t or float. D, at most 256, with TWO >= 16. BITS 2, 3, 4 or 8. GROUP, a divisor of D.
//   BLOCK, a multiple of 16. CENTER. PER, see rows.h. THREADS, a multiple of 32.
// Grid: (count / BLOCK, Hkv, B) threadgroups of THREADS, one for each block.
// Simdgroups take 32 * PER / TWO rows at a time. Buffers start at multiples of 16 bytes.

// ==== body ====
constexpr int TWO = D & -D;
constexpr int ELEMENTS = D / TWO * PER;
constexpr uint LANES = TWO / PER;
constexpr uint ROWS = 32 / LANES;
constexpr int WORDS = words_of_codes(BITS, D);
threadgroup float centroids[1 << BITS];

uint thread_ = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
uint block = threadgroup_position_in_grid.x;
ulong head = ulong(threadgroup_position_in_grid.z) * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
ulong first_row = ulong(sizes[0]) + ulong(block) * BLOCK;
const device uint* code_rows = codes + (head * ulong(sizes[1]) + first_row) * WORDS;
const device T* scale_rows = scales + (head * ulong(sizes[2]) + first_row) * (D / GROUP);
device T* out_rows = out + (head * threadgroups_per_grid.x + block) * (ulong(BLOCK) * D);

for (uint i = thread_; i < (1u << BITS); i += THREADS) { centroids[i] = book[i]; }
threadgroup_barrier(mem_flags::mem_threadgroup);

uint j = lane % LANES;
float factor[ELEMENTS];
float center[ELEMENTS];
float norm = metal::rsqrt(float(TWO));
#pragma unroll
for (int e = 0; e < ELEMENTS; e++) {
  factor[e] = factors[head * ulong(sizes[4]) + element_of<D, PER>(e, j)] * norm;
  center[e] = CENTER ? float(centers[(head * ulong(sizes[3]) + first_row / BLOCK) * D + element_of<D, PER>(e, j)]) : 0.0f;
}
for (uint first = simdgroup_index_in_threadgroup * ROWS; first < uint(BLOCK); first += THREADS / 32 * ROWS) {
  uint row = first + lane / LANES;
  Codes<BITS, ELEMENTS> packed;
  load_codes<D, PER, BITS>(code_rows + row * WORDS, j, packed);
  const device T* scale_row = scale_rows + row * (D / GROUP);
  float x[ELEMENTS];
  float scale = 0.0f;
#pragma unroll
  for (int e = 0; e < ELEMENTS; e++) {
    if (e == 0 || GROUP != D) { scale = float(scale_row[element_of<D, PER>(e, j) / uint(GROUP)]); }
    x[e] = centroids[packed.at(e)] * scale;
  }
  rotate_rows<D, PER>(x, hartley, j);
#pragma unroll
  for (int e = 0; e < ELEMENTS; e++) { x[e] = fma(x[e], factor[e], center[e]); }
  store_row<T, D, PER>(out_rows + row * D, j, x);
}
