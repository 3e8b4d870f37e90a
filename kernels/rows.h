// Rows of D values, each in a few lanes of a simdgroup: loaded, rotated, packed and unpacked without threadgroup memory.
//
// D = ODD * TWO with TWO the largest power of two in D, 16 or more. A row lies in TWO / PER neighbouring lanes (PER, a
// power of two, is chosen by the caller) and 32 * PER / TWO rows lie in a simdgroup. Lane j of a row holds in
// x[o * PER + i], for o < ODD and i < PER, element o * TWO + j * PER + i: ODD runs of PER neighbours. So the lower
// stages of a transform are additions in registers, sums over a row cost few shuffles, and a lane's codes are words.

// Element number of a lane's x[e].
template <int D, int PER> METAL_FUNC uint element_of(int e, uint j) {
  constexpr int TWO = D & -D;
  return uint(e / PER * TWO + e % PER) + j * uint(PER);
}

// ---- memory: runs of N values of type T at an address that is a multiple of N * sizeof(T), 16 at most

template <int WORDS> METAL_FUNC void load_words(const device uint* from, thread uint* words) {
  if (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      uint4 four = *(const device uint4*)(from + i);
      words[i] = four.x;
      words[(i + 1) % WORDS] = four.y;
      words[(i + 2) % WORDS] = four.z;
      words[(i + 3) % WORDS] = four.w;
    }
  } else if (WORDS == 2) {
    uint2 two = *(const device uint2*)from;
    words[0] = two.x;
    words[1 % WORDS] = two.y;
  } else {
    words[0] = *from;
  }
}

template <int WORDS> METAL_FUNC void store_words(device uint* to, const thread uint* words) {
  if (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      *(device uint4*)(to + i) =
          uint4(words[i], words[(i + 1) % WORDS], words[(i + 2) % WORDS], words[(i + 3) % WORDS]);
    }
  } else if (WORDS == 2) {
    *(device uint2*)to = uint2(words[0], words[1 % WORDS]);
  } else {
    *to = words[0];
  }
}

// One type's values in words, by the type of a pointer that is not read.
METAL_FUNC float value_in(const thread uint* words, int i, const device float*) { return as_type<float>(words[i]); }
METAL_FUNC float value_in(const thread uint* words, int i, const device float16_t*) {
  return float(as_type<float16_t>(ushort(words[i / 2] >> (i % 2 * 16))));
}
METAL_FUNC float value_in(const thread uint* words, int i, const device bfloat16_t*) {
  return as_type<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
METAL_FUNC void put_value(thread uint* words, int i, float x, const device float*) { words[i] = as_type<uint>(x); }
template <typename T> METAL_FUNC void put_value(thread uint* words, int i, float x, const device T*) {
  uint bits = uint(as_type<ushort>(static_cast<T>(x)));
  words[i / 2] = i % 2 ? words[i / 2] | (bits << 16) : bits;
}

template <typename T, int N> METAL_FUNC void load_run(const device T* from, thread float* x) {
  constexpr int WORDS = N * int(sizeof(T)) / 4;
  uint words[WORDS];
  load_words<WORDS>((const device uint*)from, words);
#pragma unroll
  for (int i = 0; i < N; i++) { x[i] = value_in(words, i, from); }
}

// Numbers beyond T's are stored as its largest.
template <typename T, int N> METAL_FUNC void store_run(device T* to, const thread float* x) {
  constexpr int WORDS = N * int(sizeof(T)) / 4;
  const device T* type = to;
  uint words[WORDS];
#pragma unroll
  for (int i = 0; i < N; i++) { put_value(words, i, within(x[i], type), type); }
  store_words<WORDS>((device uint*)to, words);
}

// A lane's part of a row that starts at `row`.
template <typename T, int D, int PER> METAL_FUNC void load_row(const device T* row, uint j, thread float* x) {
  constexpr int TWO = D & -D;
#pragma unroll
  for (int o = 0; o < D / TWO; o++) { load_run<T, PER>(row + o * TWO + j * PER, x + o * PER); }
}

template <typename T, int D, int PER> METAL_FUNC void store_row(device T* row, uint j, const thread float* x) {
  constexpr int TWO = D & -D;
#pragma unroll
  for (int o = 0; o < D / TWO; o++) { store_run<T, PER>(row + o * TWO + j * PER, x + o * PER); }
}

// ---- sums over SPAN neighbouring lanes, a power of two

template <int SPAN> METAL_FUNC float span_sum(float x) {
#pragma unroll
  for (int step = 1; step < SPAN; step *= 2) { x += simd_shuffle_xor(x, ushort(step)); }
  return x;
}
template <int SPAN> METAL_FUNC float span_max(float x) {
#pragma unroll
  for (int step = 1; step < SPAN; step *= 2) { x = max(x, simd_shuffle_xor(x, ushort(step))); }
  return x;
}

// ---- the rotation's matrix T (mlx_turboquant/rotation.py), the Kronecker product of the ODD-point Hartley matrix and
// the Walsh-Hadamard matrix of size TWO: x <- sqrt(TWO) T x. hartley: (ODD, ODD) row by row; not read when ODD is 1.
template <int D, int PER>
METAL_FUNC void rotate_rows(thread float* x, const device float* hartley, uint j) {
  constexpr int TWO = D & -D;
  constexpr int ODD = D / TWO;
  constexpr int E = ODD * PER;
#pragma unroll
  for (int step = 1; step < PER; step *= 2) {
#pragma unroll
    for (int e = 0; e < E; e++) {
      if ((e % PER & step) == 0) {
        float a = x[e], b = x[(e + step) % E];  // e + step < E: e's run goes on
        x[e] = a + b;
        x[(e + step) % E] = a - b;
      }
    }
  }
#pragma unroll
  for (int step = 1; step < TWO / PER; step *= 2) {
    float sign = (j & uint(step)) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int e = 0; e < E; e++) { x[e] = fma(x[e], sign, simd_shuffle_xor(x[e], ushort(step))); }
  }
  if (ODD > 1) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      float part[ODD];
#pragma unroll
      for (int o = 0; o < ODD; o++) { part[o] = x[o * PER + i]; }
#pragma unroll
      for (int o = 0; o < ODD; o++) {
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < ODD; k++) { sum = fma(hartley[o * ODD + k], part[k], sum); }
        x[o * PER + i] = sum;
      }
    }
  }
}

// ---- codes of WIDTH bits in one plane (mlx_turboquant/packing.py), code e of a lane at bit e * WIDTH of its words

// The plane of the high bits of 3-bit codes, the only one of width 1, is stored in another order, see packing.py.
METAL_FUNC uint spread_pairs(uint bits) {
  bits = (bits | (bits << 8)) & 0x00ff00ffu;
  bits = (bits | (bits << 4)) & 0x0f0f0f0fu;
  return (bits | (bits << 2)) & 0x33333333u;
}
METAL_FUNC uint gather_pairs(uint bits) {
  bits &= 0x33333333u;
  bits = (bits | (bits >> 2)) & 0x0f0f0f0fu;
  bits = (bits | (bits >> 4)) & 0x00ff00ffu;
  return (bits | (bits >> 8)) & 0xffffu;
}
template <int WIDTH> METAL_FUNC uint stored_order(uint word) {
  return WIDTH == 1 ? (spread_pairs(word & 0xffffu) << 2) | spread_pairs(word >> 16) : word;
}
template <int WIDTH> METAL_FUNC uint code_order(uint word) {
  return WIDTH == 1 ? gather_pairs(word >> 2) | (gather_pairs(word) << 16) : word;
}

// Lanes whose runs are shorter than a word join them by shuffles; one of them writes the word.
template <int D, int PER, int WIDTH> METAL_FUNC void store_plane(device uint* plane, uint j, const thread uint* words) {
  constexpr int TWO = D & -D;
  constexpr int ODD = D / TWO;
  constexpr int RUN = PER * WIDTH;  // bits
  if (RUN >= 32) {
    constexpr int WORDS = RUN >= 32 ? RUN / 32 : 1;
#pragma unroll
    for (int o = 0; o < ODD; o++) { store_words<WORDS>(plane + o * TWO * WIDTH / 32 + j * WORDS, words + o * WORDS); }
    return;
  }
  constexpr int PARTS = TWO * WIDTH < 32 ? 32 / (TWO * WIDTH) : 1;  // values of o that share a word
  constexpr int SPAN = 32 / PARTS / (RUN < 32 ? RUN : 32);          // lanes that share it
#pragma unroll
  for (int first = 0; first < ODD; first += PARTS) {
    uint word = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (first + part < ODD) {
        int bit = (first + part) * RUN;
        uint run = (words[bit / 32] >> (bit % 32)) & ((1u << (RUN % 32)) - 1u);
        word |= run << (uint(part * TWO * WIDTH % 32) + j % SPAN * RUN);
      }
    }
#pragma unroll
    for (int step = 1; step < SPAN; step *= 2) { word |= simd_shuffle_xor(word, ushort(step)); }
    if (j % SPAN == 0) { plane[first * TWO * WIDTH / 32 + j * RUN / 32] = stored_order<WIDTH>(word); }
  }
}

// The inverse, without shuffles.
template <int D, int PER, int WIDTH> METAL_FUNC void load_plane(const device uint* plane, uint j, thread uint* words) {
  constexpr int TWO = D & -D;
  constexpr int ODD = D / TWO;
  constexpr int RUN = PER * WIDTH;
#pragma unroll
  for (int o = 0; o < ODD; o++) {
    if (RUN >= 32) {
      constexpr int WORDS = RUN >= 32 ? RUN / 32 : 1;
      load_words<WORDS>(plane + o * TWO * WIDTH / 32 + j * WORDS, words + o * WORDS);
    } else {
      uint bit = uint(o * TWO * WIDTH) + j * RUN;
      uint run = (code_order<WIDTH>(plane[bit / 32]) >> (bit % 32)) & ((1u << (RUN % 32)) - 1u);
      words[o * RUN / 32] = (o * RUN % 32 == 0 ? 0u : words[o * RUN / 32]) | (run << (o * RUN % 32));
    }
  }
}

// E codes of one lane. 3 bits are two planes: the two low bits, then the high one.
template <int BITS, int E> struct Codes {
  uint low[(E * (BITS == 3 ? 2 : BITS) + 31) / 32];
  uint high[BITS == 3 ? (E + 31) / 32 : 1];

  METAL_FUNC void clear() {
#pragma unroll
    for (uint i = 0; i < sizeof(low) / 4; i++) { low[i] = 0; }
#pragma unroll
    for (uint i = 0; i < sizeof(high) / 4; i++) { high[i] = 0; }
  }
  METAL_FUNC void put(int e, uint code) {
    if (BITS == 3) {
      low[e * 2 / 32 % (sizeof(low) / 4)] |= (code & 3u) << (e * 2 % 32);
      high[e / 32 % (sizeof(high) / 4)] |= (code >> 2) << (e % 32);
    } else {
      low[e * BITS / 32] |= code << (e * BITS % 32);
    }
  }
  // Four codes, one in each byte: of elements first + i, first + i + n, .. with n = 8 / BITS, where a word begins at
  // `first` and nothing above BITS bits is set in a byte. 3 bits: n = 4, as for the plane of low bits.
  METAL_FUNC void put_four(int first, int i, uint codes) {
    if (BITS == 3) {
      low[first * 2 / 32 % (sizeof(low) / 4)] |= (codes & 0x03030303u) << (2 * i);
      uint bits = ((codes >> 2) & 0x01010101u) << i;  // bit i of four bytes, to become bits i, i + 4, i + 8, i + 12
      bits = (bits | (bits >> 4)) & 0x00ff00ffu;
      high[first / 32 % (sizeof(high) / 4)] |= ((bits | (bits >> 8)) & 0xffffu) << (first % 32);
    } else {
      low[first * BITS / 32 % (sizeof(low) / 4)] |= codes << (BITS * i % 32);
    }
  }
  METAL_FUNC uint at(int e) const {
    if (BITS == 3) {
      return ((low[e * 2 / 32 % (sizeof(low) / 4)] >> (e * 2 % 32)) & 3u) |
             (((high[e / 32 % (sizeof(high) / 4)] >> (e % 32)) & 1u) << 2);
    }
    return (low[e * BITS / 32] >> (e * BITS % 32)) & ((1u << BITS) - 1u);
  }
  // Take over other's codes if it is better.
  METAL_FUNC void take(const thread Codes& other, bool better) {
#pragma unroll
    for (uint i = 0; i < sizeof(low) / 4; i++) { low[i] = better ? other.low[i] : low[i]; }
#pragma unroll
    for (uint i = 0; i < sizeof(high) / 4; i++) { high[i] = better ? other.high[i] : high[i]; }
  }
  METAL_FUNC void join(const thread Codes& other) {
#pragma unroll
    for (uint i = 0; i < sizeof(low) / 4; i++) { low[i] |= other.low[i]; }
#pragma unroll
    for (uint i = 0; i < sizeof(high) / 4; i++) { high[i] |= other.high[i]; }
  }
};

template <int D, int PER, int BITS>
METAL_FUNC void store_codes(device uint* row, uint j, const thread Codes<BITS, D / (D & -D) * PER>& codes) {
  store_plane<D, PER, (BITS == 3 ? 2 : BITS)>(row, j, codes.low);
  if (BITS == 3) { store_plane<D, PER, 1>(row + (2 * D + 31) / 32, j, codes.high); }
}

template <int D, int PER, int BITS>
METAL_FUNC void load_codes(const device uint* row, uint j, thread Codes<BITS, D / (D & -D) * PER>& codes) {
  load_plane<D, PER, (BITS == 3 ? 2 : BITS)>(row, j, codes.low);
  if (BITS == 3) { load_plane<D, PER, 1>(row + (2 * D + 31) / 32, j, codes.high); }
}

METAL_FUNC constexpr int words_of_codes(int bits, int dim) {
  return bits == 3 ? (2 * dim + 31) / 32 + (dim + 31) / 32 : (bits * dim + 31) / 32;
}
