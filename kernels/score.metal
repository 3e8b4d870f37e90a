// Inner products of queries with coded rows: out = queries . values(codes) * scale, for every query and every row.
//
// Inputs
//   queries  (m, dim) float32, rotated as the rows were
//   codes    (n, W) uint32, as mlx_turboquant/packing.py packs dim codes of BITS bits: centroids of codebooks.h, but at
//            2 bits the trellis code of mlx_turboquant/ops/trellis.py
//   scales   (n,) float32
//   sizes    at least 8 int32: m, n, dim, W, tiles of queries
// Outputs
//   out      (m, n) float32
// Template: BITS 1, 2, 3, 4 or 8. TM, queries of a tile. TN, rows of a lane. NSG, simdgroups of a threadgroup. TABLES,
//   see below: BITS is 1. VEC: rows, and of 3 bits their low bits, are whole multiples of 4 words.
// Grid: x: tiles of queries, and then blocks of 32 * TN * NSG rows, so that neighbours read the same codes.
//   32 * NSG threads. Inputs of fewer than 8 numbers are padded. With VEC codes start at a multiple of 16 bytes.
//
// A lane has TN rows and all queries of the tile: TM * TN sums in registers, no sum over lanes, and a centroid that is
// looked up serves TM products. A row is taken in pieces of PIECE elements, LOW words of it: lanes read neighbouring
// words, since words of their own rows would be far apart, and exchange them through threadgroup memory. The queries'
// elements lie there too and are the same for all lanes.
// With TABLES, four bits of a row, which are four codes, pick their share of the sum from a table of 16 numbers that is
// made for each piece: one read and one addition instead of four lookups and products. All lanes read one table at a
// time, and its 16 numbers lie in different banks.
// At 2 bits an element's value is that of its window, its own code and the three before it: 8 bits of the row, of which
// the first three elements of a word have some in the word before.

// What element i of a word stands for; 3 bits come as two words of 4-bit fields, see codes.h, and 2 bits as the word and
// as its first 26 bits above the last 6 of the word before.
template <int BITS> METAL_FUNC float element(uint even, uint odd, int i, float table, threadgroup const float* wide) {
  if (BITS == 1) { return as_type<float>(((even << ((31 - i) & 31)) & 0x80000000u) ^ as_type<uint>(table)); }
  if (BITS == 3) { return centroid_of_bits<3>(table, i % 2 == 0 ? even : odd, i / 2 * 4 & 31); }
  if (BITS == 8) { return wide[(even >> (8 * i & 31)) & 255u]; }
  if (BITS == 2) { return wide[(i < 3 ? odd >> (2 * i & 31) : even >> ((2 * i - 6) & 31)) & 255u]; }
  return centroid_of_bits<4>(table, even, i * 4 & 31);
}

// What a lane holds for `element`: of 1 bit the centroid of 0, whose sign the code turns; not used at 2 and 8 bits.
template <int BITS> METAL_FUNC float table_at(uint lane) {
  return BITS == 1 ? codebook_1[0] : BITS == 3 ? codebook_3[lane % 8] : codebook_4[lane % 16];
}

// Words `from` to `from + COUNT` of ROWS rows, each word's rows side by side in `tile`; 0 beyond `words` and `rows`.
// `codes` is the first row's. An odd multiple of 4 between words keeps the lanes' stores in different banks.
template <int COUNT, int ROWS, int THREADS, bool VEC>
METAL_FUNC void load_tile(threadgroup uint* tile, const device uint* codes, uint row_words, uint from, uint words,
                          uint rows, uint tid) {
  constexpr int EACH = VEC ? (COUNT < 4 ? COUNT : 4) : 1;  // words of a lane
  constexpr int LANES = COUNT / EACH;                      // of a row
  uint word = from + tid % LANES * EACH, row = tid / LANES;
  uint mine = word < words && row < rows ? (rows - row + THREADS / LANES - 1) / (THREADS / LANES) : 0;
  const device uint* at = codes + ulong(row) * row_words + word;
  threadgroup uint* to = tile + tid % LANES * EACH * (ROWS + 4) + row;
#pragma unroll
  for (int i = 0; i < ROWS * LANES / THREADS; i++) {
    uint x[4] = {0, 0, 0, 0};
    if (uint(i) < mine) {
      if (EACH == 4) {
        uint4 four = *(const device uint4*)at;
        x[0] = four.x;
        x[1] = four.y;
        x[2] = four.z;
        x[3] = four.w;
      } else if (EACH == 2) {
        uint2 two = *(const device uint2*)at;
        x[0] = two.x;
        x[1] = two.y;
      } else {
        x[0] = *at;
      }
    }
    at += THREADS / LANES * row_words;
#pragma unroll
    for (int w = 0; w < EACH; w++) { to[w * (ROWS + 4) + i * (THREADS / LANES)] = x[w]; }
  }
}

// ==== body ====
constexpr int STEP = BITS == 3 ? 16 : 32 / BITS;  // elements of a word (at 3 bits: of the plane of low bits)
constexpr int LOW = BITS == 3 ? 4 : 8;            // words of a piece ...
constexpr int HIGH = BITS == 3 ? 2 : 0;           // ... and of its high bits
constexpr int PIECE = LOW * STEP;
constexpr int THREADS = 32 * NSG;
constexpr int ROWS = THREADS * TN;
constexpr int FIELDS = LOW * 8;  // fields of four bits
constexpr bool WIDE = BITS == 2 || BITS == 8;

threadgroup uint tile[(LOW + HIGH) * (ROWS + 4)];
threadgroup float4 elements[TABLES ? 1 : TM * PIECE / 4];
threadgroup float sums[TABLES ? TM * FIELDS * 16 : 1];
threadgroup float wide[WIDE ? 256 : 1];

uint tid = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
uint first = simdgroup_index_in_threadgroup * (32 * TN) + lane;  // the lane's first row of the block; others 32 apart
uint m = uint(sizes[0]), n = uint(sizes[1]), dim = uint(sizes[2]), words = uint(sizes[3]), tiles = uint(sizes[4]);
uint query0 = threadgroup_position_in_grid.x % tiles * TM;
uint row0 = threadgroup_position_in_grid.x / tiles * ROWS;
uint rows = min(n - row0, uint(ROWS));
const device uint* block = codes + ulong(row0) * words;
uint low_words = BITS == 3 ? (2 * dim + 31) / 32 : words;
float table = table_at<BITS>(lane);
if (WIDE) {
  for (uint i = tid; i < 256; i += THREADS) { wide[i % (WIDE ? 256 : 1)] = BITS == 2 ? trellis_value(i) : codebook_8[i]; }
}

float acc[TM][TN];
uint before[TN];  // at 2 bits: the word before
#pragma unroll
for (int t = 0; t < TN; t++) { before[t] = 0; }
#pragma unroll
for (int j = 0; j < TM; j++) {
#pragma unroll
  for (int t = 0; t < TN; t++) { acc[j][t] = 0.0f; }
}

for (uint start = 0; start < dim; start += PIECE) {
  if (start > 0) { threadgroup_barrier(mem_flags::mem_threadgroup); }
  load_tile<LOW, ROWS, THREADS, VEC>(tile, block, words, start / STEP, low_words, rows, tid);
  if (HIGH > 0) {
    load_tile<HIGH + (HIGH == 0), ROWS, THREADS, VEC>(tile + LOW * (ROWS + 4), block, words, low_words + start / 32,
                                                      words, rows, tid);
  }
  if (TABLES) {
    for (uint i = tid; i < uint(TM * FIELDS * 16); i += THREADS) {
      uint query = query0 + i / (FIELDS * 16), k = start + i / 16 % FIELDS * 4;
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        float x = query < m && k + c < dim ? queries[ulong(query) * dim + k + c] : 0.0f;
        sum = fma(x, codebook_1[i >> c & 1u], sum);
      }
      sums[i % (TABLES ? TM * FIELDS * 16 : 1)] = sum;
    }
  } else {
    constexpr int COUNT = TM * PIECE, EACH = (COUNT + THREADS - 1) / THREADS;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      uint i = uint(e) * THREADS + tid, query = query0 + i / PIECE, k = start + i % PIECE;
      float x = query < m && k < dim ? queries[ulong(query) * dim + k] : 0.0f;
      if (!TABLES && (COUNT % THREADS == 0 || i < uint(COUNT))) { ((threadgroup float*)elements)[i] = x; }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (TABLES) {
#pragma unroll
    for (int s = 0; s < LOW; s++) {
#pragma unroll
      for (int t = 0; t < TN; t++) {
        uint word = tile[s * (ROWS + 4) + first + 32 * t];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          uint field = (word >> (4 * i)) & 15u;
#pragma unroll
          for (int j = 0; j < TM; j++) { acc[j][t] += sums[TABLES ? ((j * LOW + s) * 8 + i) * 16 + field : 0]; }
        }
      }
    }
  } else {
    uint steps = min(uint(LOW), (dim - start + STEP - 1) / STEP);
    for (uint s = 0; s < steps; s++) {
      uint even[TN], odd[TN];
#pragma unroll
      for (int t = 0; t < TN; t++) {
        even[t] = tile[s * (ROWS + 4) + first + 32 * t];
        odd[t] = even[t] << 6 | before[t] >> 26;
        before[t] = even[t];
        if (BITS == 3) {
          uint low = even[t], high = tile[(LOW + s / 2) * (ROWS + 4) + first + 32 * t] << (s % 2 * 2);
          even[t] = (low & ~0x44444444u) | (high & 0x44444444u);
          odd[t] = ((low >> 2) & ~0x44444444u) | ((high >> 1) & 0x44444444u);
        }
      }
#pragma unroll
      for (int e = 0; e < STEP / 4; e++) {
        float v[TN][4];
#pragma unroll
        for (int t = 0; t < TN; t++) {
#pragma unroll
          for (int i = 0; i < 4; i++) { v[t][i] = element<BITS>(even[t], odd[t], 4 * e + i, table, wide); }
        }
#pragma unroll
        for (int j = 0; j < TM; j++) {
          float4 x = elements[TABLES ? 0 : (j * LOW + s) * (STEP / 4) + e];
#pragma unroll
          for (int t = 0; t < TN; t++) { acc[j][t] = fma(x.x, v[t][0], acc[j][t]); }
#pragma unroll
          for (int t = 0; t < TN; t++) { acc[j][t] = fma(x.y, v[t][1], acc[j][t]); }
#pragma unroll
          for (int t = 0; t < TN; t++) { acc[j][t] = fma(x.z, v[t][2], acc[j][t]); }
#pragma unroll
          for (int t = 0; t < TN; t++) { acc[j][t] = fma(x.w, v[t][3], acc[j][t]); }
        }
      }
    }
  }
}

#pragma unroll
for (int t = 0; t < TN; t++) {
  uint row = row0 + first + 32 * t;
  float scale = row < n ? scales[row] : 0.0f;
#pragma unroll
  for (int j = 0; j < TM; j++) {
    if (row < n && query0 + j < m) { out[ulong(query0 + j) * n + row] = acc[j][t] * scale; }
  }
}
