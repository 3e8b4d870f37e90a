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

// What a code stands for. 2 to 4 bits: each lane holds one centroid and codes pick a lane, so that no memory is read.
// `table` is centroid lane % 2^BITS; `wide` the 256 of 8 bits in threadgroup memory.
METAL_FUNC float centroid_of_lane(float table, uint code) {
#ifdef TURBOQUANT_CUDA
  return __shfl_sync(TURBOQUANT_WARP, table, code);  // takes the lane modulo 32, and the table repeats
#else
  return simd_shuffle(table, ushort(code & 31u));
#endif
}

// N elements of a row stored in BITS bits, or in T if BITS is 0.
template <typename T, int BITS, int N> struct Run {
  Plane<BITS, N> plane;
  METAL_FUNC void load(const device uint* row, uint first, int) { plane.load(row, first); }
  METAL_FUNC float value(int i, float table, threadgroup const float*) const {
    return centroid_of_lane(table, plane.at(i));
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
    return centroid_of_lane(table, (i % 2 == 0 ? even : odd) >> (i / 2 * 4));  // bits above the third are ignored
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
