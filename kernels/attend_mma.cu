// kernels/attend.metal's first pass again, on NVIDIA's tensor cores: same inputs, same output, same grid.
//
// It takes two-pass calls with one scale per row (KG = VG = 1) in float16 or bfloat16 with D = 64, 128 or 256, RC = 8.
// KD is the number of packed tokens that a simdgroup takes at a time (16, 32 or 64), VD is not used, SHARED_BYTES is room
// for the tables (256 bytes an entry) or for NSG * 8 * D sums. Inputs, output and the other template constants are those
// of attend.metal. 32 * NSG threads.
//
// Scores are S = Q K^T by mma.m16n8k16: 8 query rows (the other 8 are zeros) times 8 keys, 16 elements at a time. A lane
// reads D / 4 neighbouring elements of one key; the queries' elements are taken in the same order, which changes no
// product. The scores lie where the second product, O^T = V^T P, wants its weights. Values are stored by token and that
// product wants neighbouring tokens side by side, so the codes of two tokens are interleaved before they are looked up.
// A pair of codes is looked up at once, in a table of half2 that has a copy for each lane, so that no two lanes meet in
// a bank. Queries are float16 after each row is divided by a power of two (exact); weights are float16; sums are
// float32. Of raw tokens a simdgroup takes 16 at a time. Raw bfloat16 elements are taken as float16: beyond +-65504 they
// are clamped, below 6e-8 they vanish.

constant constexpr float LOG2E = 1.44269504088896f;
constant constexpr float MASKED = -3e38f;
constant constexpr float NO_KEY = -1e30f;

METAL_FUNC void mma(float (&c)[4], uint a0, uint a2, uint b0, uint b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(0u), "r"(a2), "r"(0u), "r"(b0), "r"(b1));
}
METAL_FUNC void mma(float (&c)[4], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// (a & mask) | b in one instruction, which the compiler otherwise takes apart.
METAL_FUNC uint and_or(uint a, uint mask, uint b) {
  uint r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(b));
  return r;
}
METAL_FUNC uint pack_halves(float a, float b) { return as_type<uint>(__floats2half2_rn(a, b)); }
METAL_FUNC uint min_halves(uint a, uint b) {
  return as_type<uint>(__hmin2(as_type<__half2>(a), as_type<__half2>(b)));
}
METAL_FUNC uint permute_bytes(uint a, uint b, uint selector) { return __byte_perm(a, b, selector); }

// Two raw elements (one word of T) as half2; NaN and infinities as 0.
template <typename T> struct Raw {};
template <> struct Raw<half> {
  METAL_FUNC static uint halves(uint word) {
    uint out = word;
    if ((word & 0x7c00u) == 0x7c00u) { out &= 0xffff0000u; }
    if ((word & 0x7c000000u) == 0x7c000000u) { out &= 0xffffu; }
    return out;
  }
};
template <> struct Raw<bfloat16_t> {
  METAL_FUNC static float one(uint bits) {
    float x = as_type<float>(bits);
    return (bits & 0x7f800000u) == 0x7f800000u ? 0.0f : clamp(x, -65504.0f, 65504.0f);
  }
  METAL_FUNC static uint halves(uint word) { return pack_halves(one(word << 16), one(word & 0xffff0000u)); }
};

template <typename T> METAL_FUNC float scale_of(uint two, int j) {
  return narrow_to_float<T>(ushort(j == 0 ? two & 0xffffu : two >> 16));
}
// Weights of two neighbouring tokens times their values' scales, as half2.
template <typename T, int VB> METAL_FUNC uint weigh(const float (&p)[4], uint scales) {
  if (VB == 0) { return pack_halves(p[0], p[1]); }
  return min_halves(pack_halves(p[0] * scale_of<T>(scales, 0), p[1] * scale_of<T>(scales, 1)), 0x7bff7bffu);
}

struct Lookup {
  threadgroup const char* base;
  uint mine;  // of the lane's copy of entry 0, in bytes from base; below 256
};

// The table of BITS: 2, 3 and 4 bits look up a pair of codes, 8 bits one code. An entry takes 256 bytes: 32 copies for
// keys and 32 for values, so that a code that is a byte of a word becomes a place in one instruction.
template <int BITS> struct Table {
  static constexpr int COUNT = BITS == 0 ? 0 : BITS == 2 ? 16 : 256;
  // `half` is 0 for keys and 1 for values.
  METAL_FUNC static void fill(threadgroup uint* table, int half, uint tid, uint threads) {
    for (uint i = tid; i < uint(COUNT * 32); i += threads) {
      uint e = i / 32;
      float low = 0.0f, high = 0.0f;
      if (BITS == 2) { low = codebook_2[e & 3], high = codebook_2[e >> 2]; }
      if (BITS == 3) { low = codebook_3[e & 7], high = codebook_3[e >> 4 & 7]; }  // in fields of 4 bits
      if (BITS == 4) { low = codebook_4[e & 15], high = codebook_4[e >> 4]; }
      if (BITS == 8) { low = codebook_8[e]; }
      table[e * 64 + half * 32 + i % 32] = pack_halves(low, high);
    }
  }
  // The entry at index (word >> shift) modulo COUNT; shift is a multiple of 8 if COUNT is 256.
  METAL_FUNC static uint at(Lookup table, uint word, int shift) {
    uint place;
    if (COUNT == 256) {
      place = permute_bytes(word, table.mine, 0x7604 | shift << 1);  // bytes: of `mine`, the code, 0, 0
    } else {
      place = and_or(shift >= 8 ? word >> (shift - 8) : word << (8 - shift), (COUNT - 1) << 8, table.mine);
    }
    return *(threadgroup const uint*)(table.base + place);
  }
};

// COUNT words, by as wide loads as their number allows; a run of 16 bytes starts at a multiple of 16 bytes.
template <int COUNT> METAL_FUNC void load_words(const device uint* at, thread uint* words) {
#pragma unroll
  for (int i = 0; i < COUNT; i += (COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1)) {
    if (COUNT % 4 == 0) {
      uint4 four = *(const device uint4*)(at + i);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    } else if (COUNT % 2 == 0) {
      uint2 two = *(const device uint2*)(at + i);
      words[i] = two.x, words[i + 1] = two.y;
    } else {
      words[i] = at[i];
    }
  }
}

// D / 4 neighbouring elements of one key, as pairs in half2.
template <typename T, int BITS, int N> struct KeyRun {
  uint words[N * BITS / 32];
  METAL_FUNC void load(const device uint* row, uint first, int) {
    const device uint* at = row + first * BITS / 32;
    load_words<N * BITS / 32>(at, words);
  }
  METAL_FUNC uint pair(int p, Lookup table) const {
    constexpr int PER = 16 / BITS;  // pairs in a word
    uint word = words[p / PER];
    if (BITS == 8) {
      uint low = Table<8>::at(table, word, p % PER * 16), high = Table<8>::at(table, word, p % PER * 16 + 8);
      return permute_bytes(low, high, 0x5410);
    }
    return Table<BITS>::at(table, word, p % PER * 2 * BITS);
  }
};
// 3 bits become fields of 4 bits, of even and of odd elements (codes.h). So a pair is of elements 4 i and 4 i + 2, or of
// 4 i + 1 and 4 i + 3, and queries are stored in that order.
METAL_FUNC void fields_of(uint low, uint high, thread uint& even, thread uint& odd) {
  even = (low & 0x33333333u) | (high & 0x44444444u);
  odd = ((low >> 2) & 0x33333333u) | ((high >> 1) & 0x44444444u);
}
METAL_FUNC uint order_of_3_bits(uint i) { return (i & ~3u) | (i & 1u) << 1 | (i >> 1 & 1u); }
template <typename T, int N> struct KeyRun<T, 3, N> {
  KeyRun<T, 2, N> low;
  uint high[N / 32 > 0 ? N / 32 : 1];
  METAL_FUNC void load(const device uint* row, uint first, int dim) {
    low.load(row, first, dim);
#pragma unroll
    for (int i = 0; i < (N / 32 > 0 ? N / 32 : 1); i++) { high[i] = row[dim / 16 + first / 32 + i]; }
    if (N == 16) { high[0] <<= (first & 16u) >> 3; }
  }
  METAL_FUNC uint pair(int p, Lookup table) const {
    uint even, odd;  // the compiler computes them once for the 8 pairs of a word
    fields_of(low.words[p / 8], high[p / 16] << (p / 8 % 2 * 2), even, odd);
    return Table<3>::at(table, p % 2 == 0 ? even : odd, p % 8 / 2 * 8);
  }
};
template <typename T, int N> struct KeyRun<T, 0, N> {
  uint words[N / 2];
  METAL_FUNC void load(const device uint* row, uint first, int) {
    load_words<N / 2>(row + first / 2, words);
  }
  METAL_FUNC uint pair(int p, Lookup) const { return Raw<T>::halves(words[p]); }
};

// D / 8 neighbouring elements of one value; `pair` gives element i of two tokens side by side.
template <typename T, int BITS, int N> struct ValueRun {
  uint words[N * BITS >= 32 ? N * BITS / 32 : 1];
  METAL_FUNC void load(const device uint* row, uint first, int) {
    const device uint* at = row + first * BITS / 32;
    if (N * BITS == 16) {
      words[0] = ((const device ushort*)row)[first * BITS / 16];
    } else {
      load_words<N * BITS / 32>(at, words);
    }
  }
};
// Codes of two tokens, even elements in `even` and odd ones in `odd`, next to each other.
template <typename T, int BITS, int N> struct ValuePairs {
  uint even[N * BITS >= 32 ? N * BITS / 32 : 1], odd[N * BITS >= 32 ? N * BITS / 32 : 1];
  METAL_FUNC ValuePairs(const ValueRun<T, BITS, N>& a, const ValueRun<T, BITS, N>& b) {
    constexpr uint LOW = BITS == 2 ? 0x33333333u : 0x0f0f0f0fu;
#pragma unroll
    for (int i = 0; i < (N * BITS >= 32 ? N * BITS / 32 : 1); i++) {
      even[i] = (a.words[i] & LOW) | ((b.words[i] << BITS) & ~LOW);
      odd[i] = ((a.words[i] >> BITS) & LOW) | (b.words[i] & ~LOW);
    }
  }
  METAL_FUNC uint pair(int i, Lookup table) const {
    constexpr int PER = 16 / BITS;  // even elements in a word
    uint word = i % 2 == 0 ? even[i / 2 / PER] : odd[i / 2 / PER];
    return Table<BITS>::at(table, word, i / 2 % PER * 2 * BITS);
  }
};
template <typename T, int N> struct ValuePairs<T, 8, N> {
  const ValueRun<T, 8, N>& a;
  const ValueRun<T, 8, N>& b;
  METAL_FUNC ValuePairs(const ValueRun<T, 8, N>& a_, const ValueRun<T, 8, N>& b_) : a(a_), b(b_) {}
  METAL_FUNC uint pair(int i, Lookup table) const {
    uint first = Table<8>::at(table, a.words[i / 4], i % 4 * 8);
    uint second = Table<8>::at(table, b.words[i / 4], i % 4 * 8);
    return permute_bytes(first, second, 0x5410);
  }
};
template <typename T, int N> struct ValueRun<T, 3, N> {
  ValueRun<T, 2, N> low;
  uint high;
  METAL_FUNC void load(const device uint* row, uint first, int dim) {
    low.load(row, first, dim);
    high = row[dim / 16 + first / 32];
    if (N < 32) { high <<= (first & 16u) >> 3; }
    if (N == 8) { high >>= (first & 8u) << 1; }
  }
  // Elements 0, 2, .. or 1, 3, .. as 4-bit codes.
  METAL_FUNC ValueRun<T, 4, N / 2> fields(int parity) const {
    ValueRun<T, 4, N / 2> out;
#pragma unroll
    for (int i = 0; i < (N < 16 ? 1 : N / 16); i++) {
      uint even, odd;
      fields_of(low.words[i], high << (i * 2), even, odd);
      out.words[i] = parity == 0 ? even : odd;
    }
    return out;
  }
};
template <typename T, int N> struct ValuePairs<T, 3, N> {
  ValuePairs<T, 4, N / 2> even, odd;
  METAL_FUNC ValuePairs(const ValueRun<T, 3, N>& a, const ValueRun<T, 3, N>& b)
      : even(a.fields(0), b.fields(0)), odd(a.fields(1), b.fields(1)) {}
  METAL_FUNC uint pair(int i, Lookup table) const { return (i % 2 == 0 ? even : odd).pair(i / 2, table); }
};
template <typename T, int N> struct ValueRun<T, 0, N> {
  KeyRun<T, 0, N> run;
  METAL_FUNC void load(const device uint* row, uint first, int dim) { run.load(row, first, dim); }
};
template <typename T, int N> struct ValuePairs<T, 0, N> {
  const ValueRun<T, 0, N>& a;
  const ValueRun<T, 0, N>& b;
  METAL_FUNC ValuePairs(const ValueRun<T, 0, N>& a_, const ValueRun<T, 0, N>& b_) : a(a_), b(b_) {}
  METAL_FUNC uint pair(int i, Lookup) const {
    uint first = Raw<T>::halves(a.run.words[i / 2]), second = Raw<T>::halves(b.run.words[i / 2]);
    return permute_bytes(first, second, i % 2 == 0 ? 0x5410 : 0x7632);
  }
};

// Where the rows of a run of tiles lie: packed rows one after the other, or raw ones in two arrays.
struct Packed {
  const device uint* k;
  const device uint* v;
};
struct Unpacked {
  const device uint* first_k;
  const device uint* first_v;
  const device uint* newest_k;
  const device uint* newest_v;
  uint sinks, count;
};

template <int D> struct Sums {
  float o[D / 16][4];  // elements 2 b and 2 b + 1 of the lane's D / 8, of query rows 2 tg and 2 tg + 1
  float top, total;    // of query row gq; total over the lane's keys
  float lift;          // weights are 2^lift times what they should be, so that times a value's scale they suit float16
};

// Scores (of row gq, keys 8 b + 2 tg and + 1) -> weights, and what was there is rescaled.
template <int D, int BLOCKS>
METAL_FUNC void softmax_step(Sums<D>& sums, float (&s)[BLOCKS][4], uint tg) {
  float top = s[0][0];
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) { top = max(top, max(s[b][0], s[b][1])); }
  top = max(top, simd_shuffle_xor(top, 1));
  top = max(top, simd_shuffle_xor(top, 2));
  top = max(sums.top, top);
  float shrink = fast::exp2(sums.top - top);
  bool moved = top > sums.top;
  sums.top = top;
  float sum = 0.0f, zero = top - sums.lift;
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
    s[b][0] = fast::exp2(s[b][0] - zero);
    s[b][1] = fast::exp2(s[b][1] - zero);
    sum += s[b][0] + s[b][1];
  }
  sums.total = sums.total * shrink + sum;
  if (simd_any(moved)) {
    float f0 = simd_shuffle(shrink, ushort(tg * 8)), f1 = simd_shuffle(shrink, ushort(tg * 8 + 4));
#pragma unroll
    for (int b = 0; b < D / 16; b++) {
      sums.o[b][0] *= f0;
      sums.o[b][1] *= f1;
      sums.o[b][2] *= f0;
      sums.o[b][3] *= f1;
    }
  }
}

template <int MASK, typename M>
METAL_FUNC float masked(float score, const device M* mask, ulong row, uint token, int last) {
  if (MASK == 1 && !(float(mask[row + token]) > 0.0f)) { return MASKED; }
  if (MASK == 2) { score += max(float(mask[row + token]), MASKED) * LOG2E; }
  return int(token) > last || score <= NO_KEY ? MASKED : score;
}

// ==== body ====
  constexpr int KN = D / 4, VN = D / 8;  // elements of a lane
  constexpr int E = D / 32;
  constexpr int KWORDS = words_of_row(KB, D, 2), VWORDS = words_of_row(VB, D, 2), RAW_WORDS = D / 2;
  constexpr int TILE = KD, BLOCKS = TILE / 8, PAIRS = TILE / 16;
  constexpr uint rows = G * L, chunks = (rows + 7) / 8;
  constexpr bool SHARE = KB == VB;
  
  extern __shared__ uint shared_words[];  // SHARED_BYTES: tables; in the end each simdgroup's sums
  threadgroup uint plain[8 * D / 2];      // queries as half2, each row divided by a power of two
  threadgroup uint turned[8 * D / 2];
  threadgroup float plain_factor[8];
  threadgroup float turned_factor[8];
  threadgroup float tops[NSG * 8];
  threadgroup float totals[NSG * 8];

  uint tid = thread_index_in_threadgroup;
  uint sg = simdgroup_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup;
  uint gq = lane >> 2, tg = lane & 3;
  uint b_ = threadgroup_position_in_grid.z;
  uint kvh = threadgroup_position_in_grid.y / chunks;
  uint row0 = threadgroup_position_in_grid.y % chunks * 8;
  uint split = threadgroup_position_in_grid.x;
  ulong head = ulong(b_) * HKV + kvh;
  uint sinks = uint(sizes[8 + 4 * b_]), packed = uint(sizes[9 + 4 * b_]), tail = uint(sizes[10 + 4 * b_]);
  uint raw = sinks + tail, tokens = raw + packed;

  bool on_raw = split >= uint(sizes[3]);
  uint workers = uint(on_raw ? sizes[4] : sizes[3]) * NSG;
  uint worker = (on_raw ? split - uint(sizes[3]) : split) * NSG + sg;
  uint tiles = on_raw ? (raw + 15) / 16 : packed / TILE;
  uint tile = uint(ulong(tiles) * worker / workers), stop = uint(ulong(tiles) * (worker + 1) / workers);

  ulong base = head * ulong(sizes[0]);
  const device uint* next_k = (const device uint*)k_codes + (base + ulong(tile * TILE + gq)) * KWORDS;
  const device uint* next_v = (const device uint*)v_codes + (base + ulong(tile * TILE + 2 * tg)) * VWORDS;
  const device T* kscales = k_scales + base + tile * TILE + 2 * tg;
  const device T* vscales = v_scales + base + tile * TILE + 2 * tg;
  KeyRun<T, KB, KN> k[BLOCKS];
  if (!on_raw && tile < stop) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) { k[b].load(next_k + 8 * b * KWORDS, tg * KN, D); }
  }

  // Queries: as they are for raw keys and centres, transformed for packed keys.
  const device float* signs = table + 8;
  const device float* hartley = signs + D;
  for (uint r = sg; r < 8; r += NSG) {
    float x[E], y[E];
    float largest = 0.0f;
    bool live = row0 + r < rows;
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      x[e] = live ? float(q[(head * rows + row0 + (live ? r : 0)) * D + i]) : 0.0f;
      y[e] = x[e] * (KB == 0 ? 1.0f : BALANCE ? signs[i] / float(balance[head * D + i]) : signs[i]);
      largest = max(largest, abs(x[e]));
    }
    if (KB > 0) { hadamard_hartley<D>(y, hartley, lane); }
    float largest_turned = 0.0f;
    for (int e = 0; e < E; e++) { largest_turned = max(largest_turned, abs(y[e])); }
    largest = simd_max(largest);
    largest_turned = simd_max(largest_turned);
    float power = as_type<float>(max(as_type<uint>(largest) & 0x7f800000u, 0x00800000u));
    float power_turned = as_type<float>(max(as_type<uint>(largest_turned) & 0x7f800000u, 0x00800000u));
    for (int e = 0; e < E; e++) {
      uint i = uint(e) * 32 + lane;
      ((threadgroup half*)plain)[r * D + i] = half(x[e] / power);
      ((threadgroup half*)turned)[r * D + (KB == 3 ? order_of_3_bits(i) : i)] = half(y[e] / power_turned);
    }
    if (lane == 0) {
      plain_factor[r] = power * table[0] * LOG2E;
      turned_factor[r] = power_turned * table[0] * LOG2E;
    }
  }
  if (!on_raw) {
    Table<KB>::fill(shared_words, 0, tid, 32 * NSG);
    if (!SHARE) { Table<VB>::fill(shared_words, 1, tid, 32 * NSG); }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Lookup ktable = {(threadgroup const char*)shared_words, lane * 4};
  Lookup vtable = {(threadgroup const char*)shared_words, lane * 4 + (SHARE ? 0 : 128)};

  Sums<D> sums;
  sums.top = NO_KEY;
  sums.total = 0.0f;
  sums.lift = 0.0f;
#pragma unroll
  for (int b = 0; b < D / 16; b++) {
#pragma unroll
    for (int j = 0; j < 4; j++) { sums.o[b][j] = 0.0f; }
  }
  uint my_row = row0 + gq < rows ? row0 + gq : rows - 1;
  uint query = my_row % L;
  int last = CAUSAL ? int(tokens + query) - L : 0x7fffffff;
  ulong mask_row = ulong(b_) * ulong(sizes[5]) + ulong(kvh * G + my_row / L) * ulong(sizes[6]) +
                   ulong(query) * ulong(sizes[7]);

  if (!on_raw) {
    uint qa[D / 8];  // row gq, the lane's elements
#pragma unroll
    for (int i = 0; i < D / 8; i++) { qa[i] = turned[(gq * D + tg * KN) / 2 + i]; }
    float factor = turned_factor[gq];
    float centers8[4];  // scores of 8 centres: row gq, blocks 2 tg and 2 tg + 1
    uint center_group = 0xffffffffu;
    const device T* centers = k_centers + base / BLOCK * D;
    uint blocks_here = packed / BLOCK;
    if (VB > 0 && tile < stop) {
      // As the first tile's scales are, so are the others', give or take what float16 has room for.
      float largest = 0.0f;
      for (uint i = lane; i < uint(TILE); i += 32) { largest = max(largest, float(v_scales[base + tile * TILE + i])); }
      int exponent = int(as_type<uint>(simd_max(largest)) >> 23) - 127;
      sums.lift = float(-clamp(exponent, -60, 60));
    }
    for (; tile < stop; tile++) {
      ValueRun<T, VB, VN> v[PAIRS][4];
      constexpr int OFFSETS[4] = {0, 1, 8, 9};
#pragma unroll
      for (int n = 0; n < PAIRS; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          v[n][j].load(next_v + (16 * n + OFFSETS[j]) * VWORDS, gq * VN, D);
        }
      }
      uint kscale[BLOCKS], vscale[BLOCKS];  // of two neighbouring tokens each
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        kscale[b] = KB > 0 ? *(const device uint*)(kscales + 8 * b) : 0;
        vscale[b] = VB > 0 ? *(const device uint*)(vscales + 8 * b) : 0;
      }
      float center = 0.0f;
      if (CENTER) {
        uint block = tile * TILE / BLOCK;
        if (block / 8 != center_group) {
          center_group = block / 8;
          uint mine = min(center_group * 8 + gq, blocks_here - 1);
          const device uint* row = (const device uint*)(centers + ulong(mine) * D);
          KeyRun<T, 0, KN> c;
          c.load(row, tg * KN, D);
#pragma unroll
          for (int j = 0; j < 4; j++) { centers8[j] = 0.0f; }
#pragma unroll
          for (int i = 0; i < D / 16; i++) {
            uint at = (gq * D + tg * KN) / 2 + 2 * i;
            mma(centers8, plain[at], plain[at + 1], c.pair(2 * i, ktable), c.pair(2 * i + 1, ktable));
          }
        }
        uint from = gq * 4 + block % 8 / 2;
        float even = simd_shuffle(centers8[0], ushort(from)), odd = simd_shuffle(centers8[1], ushort(from));
        center = (block % 2 == 0 ? even : odd) * plain_factor[gq];
      }
      float s[BLOCKS][4];
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) { s[b][0] = s[b][1] = s[b][2] = s[b][3] = 0.0f; }
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
          mma(s[b], qa[2 * i], qa[2 * i + 1], k[b].pair(2 * i, ktable), k[b].pair(2 * i + 1, ktable));
        }
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          s[b][j] = fma(s[b][j], KB > 0 ? scale_of<T>(kscale[b], j) * factor : factor, center);
          if (MASK > 0 || CAUSAL) {
            s[b][j] = masked<MASK>(s[b][j], mask, mask_row, sinks + tile * TILE + 8 * b + 2 * tg + j, last);
          }
        }
      }
      next_k += TILE * KWORDS;
      next_v += TILE * VWORDS;
      kscales += TILE;
      vscales += TILE;
      if (tile + 1 < stop) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) { k[b].load(next_k + 8 * b * KWORDS, tg * KN, D); }
      }
      softmax_step<D, BLOCKS>(sums, s, tg);
#pragma unroll
      for (int n = 0; n < PAIRS; n++) {
        uint p0 = weigh<T, VB>(s[2 * n], vscale[2 * n]), p1 = weigh<T, VB>(s[2 * n + 1], vscale[2 * n + 1]);
        ValuePairs<T, VB, VN> lower(v[n][0], v[n][1]), upper(v[n][2], v[n][3]);
#pragma unroll
        for (int b = 0; b < D / 16; b++) {
          mma(sums.o[b], lower.pair(2 * b, vtable), lower.pair(2 * b + 1, vtable), upper.pair(2 * b, vtable),
              upper.pair(2 * b + 1, vtable), p0, p1);
        }
      }
    }
  } else {
    uint qa[D / 8];
#pragma unroll
    for (int i = 0; i < D / 8; i++) { qa[i] = plain[(gq * D + tg * KN) / 2 + i]; }
    float factor = plain_factor[gq];
    const device uint* first_k = (const device uint*)sink_k + head * ulong(sizes[2]) * RAW_WORDS;
    const device uint* first_v = (const device uint*)sink_v + head * ulong(sizes[2]) * RAW_WORDS;
    const device uint* newest_k = (const device uint*)tail_k + head * ulong(sizes[1]) * RAW_WORDS;
    const device uint* newest_v = (const device uint*)tail_v + head * ulong(sizes[1]) * RAW_WORDS;
    for (; tile < stop; tile++) {
      float s[2][4];
#pragma unroll
      for (int b = 0; b < 2; b++) {
        uint n = min(tile * 16 + 8 * b + gq, raw - 1);
        KeyRun<T, 0, KN> key;
        key.load(n < sinks ? first_k + ulong(n) * RAW_WORDS : newest_k + ulong(n - sinks) * RAW_WORDS, tg * KN, D);
        s[b][0] = s[b][1] = s[b][2] = s[b][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
          mma(s[b], qa[2 * i], qa[2 * i + 1], key.pair(2 * i, ktable), key.pair(2 * i + 1, ktable));
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
          uint token = tile * 16 + 8 * b + 2 * tg + j;
          s[b][j] = token < raw ? s[b][j] * factor : MASKED;
          if ((MASK > 0 || CAUSAL) && token < raw) {
            s[b][j] = masked<MASK>(s[b][j], mask, mask_row, token < sinks ? token : token + packed, last);
          }
        }
      }
      softmax_step<D, 2>(sums, s, tg);
      ValueRun<T, 0, VN> v[4];
      constexpr int OFFSETS[4] = {0, 1, 8, 9};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint n = min(tile * 16 + 2 * tg + OFFSETS[j], raw - 1);
        v[j].load(n < sinks ? first_v + ulong(n) * RAW_WORDS : newest_v + ulong(n - sinks) * RAW_WORDS, gq * VN, D);
      }
      uint p0 = pack_halves(s[0][0], s[0][1]), p1 = pack_halves(s[1][0], s[1][1]);
      ValuePairs<T, 0, VN> lower(v[0], v[1]), upper(v[2], v[3]);
#pragma unroll
      for (int b = 0; b < D / 16; b++) {
        mma(sums.o[b], lower.pair(2 * b, vtable), lower.pair(2 * b + 1, vtable), upper.pair(2 * b, vtable),
            upper.pair(2 * b + 1, vtable), p0, p1);
      }
    }
  }

  float down = fast::exp2(-sums.lift);
  sums.total *= down;
  sums.total += simd_shuffle_xor(sums.total, 1);
  sums.total += simd_shuffle_xor(sums.total, 2);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tables are dead from here
  threadgroup float* shared_rows = (threadgroup float*)shared_words;
#pragma unroll
  for (int b = 0; b < D / 16; b++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      shared_rows[(sg * 8 + 2 * tg + (j & 1)) * D + gq * VN + 2 * b + (j >> 1)] = sums.o[b][j] * down;
    }
  }
  if (tg == 0) {
    tops[sg * 8 + gq] = sums.top;
    totals[sg * 8 + gq] = sums.total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint r = sg; r < 8 && row0 + r < rows; r += NSG) {
    float top = NO_KEY, total = 0.0f, sum[E];
    for (uint s = 0; s < uint(NSG); s++) { top = max(top, tops[s * 8 + r]); }
    for (int e = 0; e < E; e++) { sum[e] = 0.0f; }
    for (uint s = 0; s < uint(NSG); s++) {
      float f = fast::exp2(tops[s * 8 + r] - top);
      total += f * totals[s * 8 + r];
      for (int e = 0; e < E; e++) { sum[e] += f * shared_rows[(s * 8 + r) * D + e * 32 + lane]; }
    }
    ulong at = ((head * rows + row0 + r) * threadgroups_per_grid.x + split) * (D + 2);
    for (int e = 0; e < E; e++) { out[at + e * 32 + lane] = sum[e]; }
    if (lane == 0) {
      out[at + D] = top;
      out[at + D + 1] = total;
    }
  }
