// Runs of N neighbouring elements of one stored row: loaded as whole words, read one by one.

// WIDTH-bit codes as mlx_turboquant/packing.py lays them out, in one plane. `first`, the run's first element, is a
// multiple of N; a run of 16 bytes starts at a multiple of 16 bytes, and so on down.
template <int WIDTH, int N> struct Plane {
  uint words[WIDTH * N > 32 ? WIDTH * N / 32 : 1];
  METAL_FUNC void load(const device uint* plane, uint first) {
    const device uint* at = plane + first * WIDTH / 32;
    if (WIDTH * N == 128) {
      uint4 four = *(const device uint4*)at;
      words[0] = four.x;
      words[1 % (sizeof(words) / 4)] = four.y;
      words[2 % (sizeof(words) / 4)] = four.z;
      words[3 % (sizeof(words) / 4)] = four.w;
    } else if (WIDTH * N == 64) {
      uint2 two = *(const device uint2*)at;
      words[0] = two.x;
      words[1 % (sizeof(words) / 4)] = two.y;
    } else if (WIDTH * N == 32) {
      words[0] = *at;
    } else if (WIDTH * N == 16) {
      words[0] = ((const device ushort*)plane)[first * WIDTH / 16];
    } else {
      words[0] = ((const device uchar*)plane)[first * WIDTH / 8];
    }
  }
  // Element i's code in the lowest bits, other bits above it.
  METAL_FUNC uint at(int i) const { return words[i * WIDTH / 32] >> (i * WIDTH % 32); }
};

// What a code stands for, without reading memory but at 8 bits. Each lane holds centroid lane % 2^BITS in `table`, and on
// NVIDIA's GPUs a code picks a lane. Apple's have no such instruction: theirs takes one lane of each quad, and any lane is
// a sequence of many (docs/kernels.md). There 2 bits pick a lane of the quad, and 3 and 4 are arithmetic.
#ifdef TURBOQUANT_LOOKUP_BY_EXCHANGE
constant constexpr bool BY_EXCHANGE = true;
#else
constant constexpr bool BY_EXCHANGE = false;
#endif

METAL_FUNC float centroid_of_lane(float table, uint code) {
#ifdef TURBOQUANT_CUDA
  return __shfl_sync(TURBOQUANT_WARP, table, code);  // takes the lane modulo 32, and the table repeats
#else
  return simd_shuffle(table, ushort(code & 31u));
#endif
}

// The centroid of the code u + (2^BITS - 1) / 2; BITS is 3 or 4.
template <int BITS> METAL_FUNC float centroid_by_terms(float u) {
  constexpr int TERMS = BITS == 3 ? 4 : 8;
  float square = u * u, sum = BITS == 3 ? centroid_terms_3[3] : centroid_terms_4[7];
#pragma unroll
  for (int k = TERMS - 2; k >= 0; k--) {
    sum = fma(sum, square, BITS == 3 ? centroid_terms_3[k % 4] : centroid_terms_4[k % 8]);
  }
  return u * sum;
}

// The centroid of the BITS bits of `word` from `bit` on, which is a constant once loops are unrolled; BITS is 2, 3 or 4.
template <int BITS> METAL_FUNC float centroid_of_bits(float table, uint word, int bit) {
  if (BY_EXCHANGE) { return centroid_of_lane(table, word >> bit); }
  if (BITS == 2) { return quad_shuffle(table, ushort((word >> bit) & 3u)); }
  // With the exponent of 2^23 above them the bits are the float 2^23 + code * 2^at. Times 2^-at, less 2^(23 - at) and the
  // middle of the codes, it is exact in one fma, since that constant is a float too; at = 0 needs a step more.
  constexpr float MIDDLE = 0.5f * float((1 << BITS) - 1);
  bool beyond = bit + BITS > 23;
  int at = beyond ? bit - 9 : bit;
  float x = as_type<float>(((beyond ? word >> 9 : word) & (((1u << BITS) - 1u) << at)) | 0x4b000000u);
  return centroid_by_terms<BITS>(
      at == 0 ? (x - 8388608.0f) - MIDDLE : fma(x, 1.0f / float(1 << at), -float(1 << (23 - at)) - MIDDLE));
}

// N elements of a row stored in BITS bits, or in T if BITS is 0. `wide`: the 256 centroids of 8 bits.
template <typename T, int BITS, int N> struct Run {
  Plane<BITS, N> plane;
  METAL_FUNC void load(const device uint* row, uint first, int) { plane.load(row, first); }
  METAL_FUNC float value(int i, float table, threadgroup const float*) const {
    return centroid_of_bits<BITS>(table, plane.words[i * BITS / 32], i * BITS % 32);
  }
};

template <typename T, int N> struct Run<T, 8, N> {
  Plane<8, N> plane;
  METAL_FUNC void load(const device uint* row, uint first, int) { plane.load(row, first); }
  METAL_FUNC float value(int i, float, threadgroup const float* wide) const { return wide[plane.at(i) & 255u]; }
};

// 3 bits are a plane of the two low bits and, 2 * dim bits further, rounded up to a word, one of the high bits, in the
// order of packing.py: a few operations make words of 4-bit fields of them, of the even and of the odd elements.
template <typename T, int N> struct Run<T, 3, N> {
  uint even, odd;  // N is 8 or 16
  METAL_FUNC void load(const device uint* row, uint first, int dim) {
    uint high = row[(2 * dim + 31) / 32 + first / 32] << ((first & 16u) >> 3);
    uint low = N == 16 ? row[first / 16] : ((const device ushort*)row)[first / 8];
    if (N == 8) { high >>= (first & 8u) << 1; }
    even = (low & ~0x44444444u) | (high & 0x44444444u);
    odd = ((low >> 2) & ~0x44444444u) | ((high >> 1) & 0x44444444u);
  }
  METAL_FUNC float value(int i, float table, threadgroup const float*) const {
    return centroid_of_bits<3>(table, i % 2 == 0 ? even : odd, i / 2 * 4);
  }
};

template <typename T> METAL_FUNC float narrow_to_float(ushort bits) { return float(as_type<T>(bits)); }
template <> METAL_FUNC float narrow_to_float<float>(ushort) { return 0.0f; }

template <typename T, int N> struct Run<T, 0, N> {
  uint words[sizeof(T) * N / 4];
  METAL_FUNC void load(const device uint* row, uint first, int) {
    const device uint4* at = (const device uint4*)(row + first * sizeof(T) / 4);
#pragma unroll
    for (uint i = 0; i < sizeof(T) * N / 16; i++) {
      uint4 four = at[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  }
  // NaN and infinities count as 0, as they do once they are encoded.
  METAL_FUNC float value(int i, float, threadgroup const float*) const {
    float x = sizeof(T) == 4 ? as_type<float>(words[i * sizeof(T) / 4])
                             : narrow_to_float<T>(ushort(words[i * sizeof(T) / 4] >> (16 * (i % 2))));
    return (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u ? 0.0f : x;
  }
};

// uint32 words of one row.
METAL_FUNC constexpr int words_of_row(int bits, int dim, int item_bytes) {
  return bits == 0 ? dim * item_bytes / 4 : bits == 3 ? (2 * dim + 31) / 32 + (dim + 31) / 32 : (bits * dim + 31) / 32;
}
