// Encode whole blocks of keys or values: centre, balance, rotate, quantize, pack, in one dispatch.
//
// Inputs
//   rows     (B, Hkv, capacity, D) T, a whole buffer; encoded are `count` rows from row `start` on
//   signs    (D,) float32, the rotation's
//   balance  (B, Hkv, D) float32 that rows are multiplied with first; not read if not BALANCE
//   hartley  at least 8 float32: the rotation's (ODD, ODD) matrix row by row, D = ODD * TWO; see rows.h
//   tables   float32: 2^BITS centroids, TERMS coefficients of the cell polynomial, SCALINGS pairs (a, b), the largest T
//   sizes    at least 8 int32: start, capacity
// Outputs, n = count / BLOCK blocks
//   codes    (B, Hkv, count, W) uint32, as mlx_turboquant/packing.py packs
//   scales   (B, Hkv, count, D / GROUP) T
//   centers  (B, Hkv, n, D) T; 8 zeros if not CENTER
//   bad      (B, Hkv, n, BAD_WORDS) uint32, BAD_WORDS = BLOCK / 32 rounded up: bit r % 32 of word r / 32 is set if row r
//            of the block holds a number that is not finite (as survey.metal has it)
// Template: T float16_t, bfloat16_t or float. D, at most 256, with TWO >= 16. BITS 2, 3, 4 or 8. GROUP, a divisor of D.
//   BLOCK, a multiple of 16. CENTER. BALANCE. SCALINGS tried. TERMS of the polynomial. PER, see rows.h: at least 2 lanes
//   for a row, and where PER divides GROUP and GROUP divides TWO or TWO divides GROUP, no masks are needed. THREADS, a
//   multiple of 32 and at least D / 8.
// Grid: (n, Hkv, B) threadgroups of THREADS, one for each block.
// Simdgroups take 32 * PER / TWO rows at a time. A block is read twice, for its mean and to be encoded: the second time
// it comes from a cache. Buffers start at multiples of 16 bytes, as those that MLX allocates do.
//
// The arithmetic is that of ops/lloyd_max.py in float32, in another order. Two rotations, sums or products that differ
// in their last bits can change a code only where a value lies on the edge of two cells, or the choice between two
// scalings that are equally good, to about six digits.

// Row energies between which fifth powers of 1 / rms are neither 0 nor infinite; others are scaled by a power of 2.
#define USUAL_LOW 1e-10f
#define USUAL_HIGH 1e10f
// A float from here on has steps of 1/256, so its second-lowest byte is its integer part above 32768: one byte
// extraction instead of a conversion, which costs GPUs four times as much.
#define BYTE_AT 32768.0f

METAL_FUNC bool is_finite(float x) { return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u; }

// LARGEST of mlx_turboquant/conditioning.py: larger entries are clipped, so that every sum stays finite.
#define LARGEST 1e33f
METAL_FUNC float finite_part(float x) { return is_finite(x) ? clamp(x, -LARGEST, LARGEST) : 0.0f; }

// One block's mean row over finite entries, rounded to T: into memory and, as float, into the first D of `sums`.
template <typename T, int D, int BLOCK, int THREADS>
METAL_FUNC void find_center(const device T* rows, device T* center, threadgroup float* sums, uint thread_) {
  constexpr uint CHUNKS = D / 8;  // a thread adds up 8 channels of every TEAMS-th row
  constexpr uint TEAMS = THREADS / CHUNKS;
  uint team = thread_ / CHUNKS, channel = thread_ % CHUNKS * 8;
  if (team < TEAMS) {
    float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (uint row = team; row < uint(BLOCK); row += TEAMS) {
      float x[8];
      load_run<T, 8>(rows + row * D + channel, x);
#pragma unroll
      for (int i = 0; i < 8; i++) { sum[i] += x[i]; }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) { sums[team * D + channel + i] = sum[i]; }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint d = thread_; d < uint(D); d += THREADS) {
    float sum = 0.0f, count = float(BLOCK);
    for (uint i = 0; i < TEAMS; i++) { sum += sums[i * D + d]; }
    if (!is_finite(sum) || abs(sum) > LARGEST) {
      sum = count = 0.0f;
      for (uint row = 0; row < uint(BLOCK); row++) {
        float x = float(rows[row * D + d]);
        sum += finite_part(x);
        count += is_finite(x) ? 1.0f : 0.0f;
      }
      count = max(count, 1.0f);
    }
    T mean = static_cast<T>(sum / count);
    center[d] = mean;
    sums[d] = float(mean);  // only this thread reads column d
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The second-lowest bytes of four words, the first lowest.
METAL_FUNC uint second_bytes(uint a, uint b, uint c, uint d) {
#ifdef TURBOQUANT_CUDA
  return __byte_perm(__byte_perm(a, b, 0x51), __byte_perm(c, d, 0x51), 0x5410);
#else
  return as_type<uint>(uchar4(as_type<uchar4>(a).y, as_type<uchar4>(b).y, as_type<uchar4>(c).y, as_type<uchar4>(d).y));
#endif
}

// A group at one scaling: how to find cells, and this lane's part of what becomes of it.
template <int BITS, int TERMS, int E> struct Trial {
  float cell[TERMS];  // x = factor * y lies in cell x (cell[0] + cell[1] x^2 + ...) of the codebook
  float factor;
  float energy;  // <c, c> of the centroids c
  float dot;     // <y, c>; at 8 bits -<x - c, x - c>, since cosines cannot tell which of two good ones is nearer
  Codes<BITS, E> codes;

  METAL_FUNC void prepare(float scaling, const thread float* cells) {
    // The coefficients of few terms take up the powers of the scaling; those of many would overflow.
    constexpr bool FOLD = TERMS <= 3;
    factor = FOLD ? 1.0f : scaling;
    float power = FOLD ? scaling : 1.0f;
#pragma unroll
    for (int k = 0; k < TERMS; k++) {
      cell[k] = cells[k] * power;
      power *= FOLD ? scaling * scaling : 1.0f;
    }
    energy = dot = 0.0f;
    codes.clear();
  }

  // A word whose second-lowest byte is the code of y. square: y^2. CALM: all lanes are here.
  template <bool CALM> METAL_FUNC uint quantize(float y, float square, float table, const threadgroup float* book) {
    constexpr float COUNT = float(1 << BITS);
    float x = y * factor, slope = cell[TERMS - 1];
    square *= factor * factor;
#pragma unroll
    for (int k = TERMS - 2; k >= 0; k--) { slope = fma(slope, square, cell[k]); }
    float position = fma(x, slope, BYTE_AT + COUNT / 2.0f);
    // At 4 and 8 bits the scalings keep the largest entry inside the table.
    if (BITS < 4) { position = clamp(position, BYTE_AT, BYTE_AT + COUNT - 1.0f / 256.0f); }
    uint word = as_type<uint>(position);
    float c;
    if (!BY_EXCHANGE && (BITS == 3 || BITS == 4)) {
      c = centroid_by_terms<BITS>(as_type<float>(word & ~255u) - (BYTE_AT + 0.5f * (COUNT - 1.0f)));
    } else {
      c = CALM && BITS < 8 ? centroid_of_bits<BITS>(table, word, 8) : book[(word >> 8) & 255u];
    }
    energy = fma(c, c, energy);
    dot = BITS == 8 ? fma(c - x, x - c, dot) : fma(y, c, dot);
    return word;
  }
};

// Codes of elements FIRST to LAST at all scalings.
template <int D, int PER, int BITS, int GROUP, int SCALINGS, int TERMS, int FIRST, int LAST, bool MASKED>
METAL_FUNC void quantize_group(
    const thread float* y, uint j, uint group, float table, const threadgroup float* book,
    thread Trial<BITS, TERMS, D / (D & -D) * PER>* trials) {
  constexpr int LOW = BITS == 3 ? 2 : BITS;
  constexpr int WORD = 32 / LOW;     // codes in a word
  constexpr int GATHERS = WORD / 4;  // codes in a byte: every so many elements, four bytes of one word
  if (MASKED || FIRST % WORD != 0 || LAST % WORD != 0) {
#pragma unroll
    for (int e = FIRST; e < LAST; e++) {
      if (MASKED && element_of<D, PER>(e, j) / uint(GROUP) != group) { continue; }
#pragma unroll
      for (int k = 0; k < SCALINGS; k++) {
        uint word = trials[k].template quantize<!MASKED>(y[e], y[e] * y[e], table, book);
        trials[k].codes.put(e, (word >> 8) & 255u);
      }
    }
    return;
  }
#pragma unroll
  for (int first = FIRST; first < LAST; first += WORD) {
#pragma unroll
    for (int i = 0; i < GATHERS; i++) {
      uint words[SCALINGS * 4];
#pragma unroll
      for (int b = 0; b < 4; b++) {
        float value = y[(first + b * GATHERS + i) % LAST], square = value * value;
#pragma unroll
        for (int k = 0; k < SCALINGS; k++) {
          words[4 * k + b] = trials[k].template quantize<true>(value, square, table, book);
        }
      }
#pragma unroll
      for (int k = 0; k < SCALINGS; k++) {
        uint four = second_bytes(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]);
        trials[k].codes.put_four(first, i, four);
      }
    }
  }
}

template <typename T, int D, int PER, int BITS, int GROUP, bool CENTER, int SCALINGS, int TERMS> struct Encoder {
  float center[CENTER ? D / (D & -D) * PER : 1];
  float factor[D / (D & -D) * PER];
  float cells[TERMS];
  float pairs[2 * SCALINGS];
  float largest;
  float centroid;  // number lane % 2^BITS

  template <bool BALANCE>
  METAL_FUNC void prepare(
      const device float* signs, const device float* balance, const device float* tables,
      const threadgroup float* mean, uint j, uint lane) {
    constexpr int E = D / (D & -D) * PER;
    centroid = tables[lane % (1u << BITS)];
#pragma unroll
    for (int e = 0; e < E; e++) {
      factor[e] = signs[element_of<D, PER>(e, j)];
      if (BALANCE) { factor[e] *= balance[element_of<D, PER>(e, j)]; }
      if (CENTER) { center[e % (sizeof(center) / 4)] = mean[element_of<D, PER>(e, j)]; }
    }
    const device float* table = tables + (1 << BITS);
#pragma unroll
    for (int k = 0; k < TERMS; k++) { cells[k] = table[k]; }
#pragma unroll
    for (int k = 0; k < 2 * SCALINGS; k++) { pairs[k] = table[TERMS + k]; }
    largest = table[TERMS + 2 * SCALINGS];
  }

  // y <- sqrt(TWO) times the conditioned, rotated row. Where it is CHECKED, `bad` says whether it holds a number that is
  // not finite, in all of its lanes.
  template <bool CHECKED>
  METAL_FUNC void read(const device T* row, const device float* hartley, uint j, thread float* y, thread bool& bad) const {
    constexpr int E = D / (D & -D) * PER;
    float found = 0.0f;
    load_row<T, D, PER>(row, j, y);
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (CHECKED) { found = is_finite(y[e]) ? found : 1.0f; }
      float x = CENTER ? y[e] - center[e % (sizeof(center) / 4)] : y[e];
      y[e] = (CHECKED ? finite_part(x) : x) * factor[e];
    }
    if (CHECKED) { bad = span_max<(D & -D) / PER>(found) > 0.0f; }
    rotate_rows<D, PER>(y, hartley, j);
  }

  template <int FIRST, int LAST, int SPAN, bool MASKED>
  METAL_FUNC void measure(
      const thread float* y, uint j, uint group, thread float& top, thread float& energy) const {
    top = energy = 0.0f;
#pragma unroll
    for (int e = FIRST; e < LAST; e++) {
      if (MASKED && element_of<D, PER>(e, j) / uint(GROUP) != group) { continue; }
      top = max(top, abs(y[e]));
      energy = fma(y[e], y[e], energy);
    }
    top = span_max<SPAN>(top);
    energy = span_sum<SPAN>(energy);
  }

  // The larger, the nearer the direction of a group's centroids is to the group's.
  template <int SPAN> METAL_FUNC float fit(float dot, float energy, float factor) const {
    dot = span_sum<SPAN>(dot);
    return BITS == 8 ? dot / (factor * factor) : dot * metal::rsqrt(energy);
  }

  // One group, elements FIRST to LAST of SPAN lanes: its codes join `codes`; its scale.
  template <int FIRST, int LAST, int SPAN, bool MASKED>
  METAL_FUNC float encode(
      const device T* row, const device float* hartley, const threadgroup float* book, uint j, uint group,
      thread float* y, thread Codes<BITS, D / (D & -D) * PER>& codes, thread bool& bad) const {
    float top, energy;
    float unit = metal::rsqrt(float(D & -D));
    measure<FIRST, LAST, SPAN, MASKED>(y, j, group, top, energy);
    // A NaN or infinity in the row has spread over all of it, so that its energy is not finite either, nor is that of
    // entries that must be clipped.
    if (simd_any(!(energy > GROUP * USUAL_LOW && energy < GROUP * USUAL_HIGH))) {
      read<true>(row, hartley, j, y, bad);
      measure<FIRST, LAST, SPAN, MASKED>(y, j, group, top, energy);
      uint exponent = min(as_type<uint>(top) >> 23, 253u);
      float down = as_type<float>((254u - exponent) << 23);
      unit *= as_type<float>(exponent << 23);
#pragma unroll
      for (int e = FIRST; e < LAST; e++) {
        if (MASKED && element_of<D, PER>(e, j) / uint(GROUP) != group) { continue; }
        y[e] *= down;
      }
      measure<FIRST, LAST, SPAN, MASKED>(y, j, group, top, energy);
      top = top > 0.0f ? top : 1.0f;
    }
    float per_rms = metal::rsqrt(max(energy * (1.0f / GROUP), 1e-12f));
    float root = metal::rsqrt(top);  // cheaper than a division
    float per_top = root * root;
    Trial<BITS, TERMS, D / (D & -D) * PER> trials[SCALINGS];
    float cell[TERMS];
#pragma unroll
    for (int k = 0; k < TERMS; k++) { cell[k] = cells[k]; }
#pragma unroll
    for (int k = 0; k < SCALINGS; k++) {
      trials[k].prepare(pairs[2 * k] * per_rms + pairs[2 * k + 1] * per_top, cell);
    }
    quantize_group<D, PER, BITS, GROUP, SCALINGS, TERMS, FIRST, LAST, MASKED>(y, j, group, centroid, book, trials);
    Codes<BITS, D / (D & -D) * PER> best = trials[0].codes;
    float best_energy = span_sum<SPAN>(trials[0].energy), best_fit = 0.0f;
    if (SCALINGS > 1) { best_fit = fit<SPAN>(trials[0].dot, best_energy, trials[0].factor); }
#pragma unroll
    for (int k = 1; k < SCALINGS; k++) {
      float own = span_sum<SPAN>(trials[k].energy), own_fit = fit<SPAN>(trials[k].dot, own, trials[k].factor);
      bool better = own_fit > best_fit;
      best.take(trials[k].codes, better);
      best_fit = better ? own_fit : best_fit;
      best_energy = better ? own : best_energy;
    }
    codes.join(best);
    // sqrt(energy / best_energy), of a group that may be 0
    return min(energy * metal::rsqrt(max(energy * best_energy, 1e-30f)) * unit, largest);
  }
};

// The groups of a row, one after the other; template recursion, since their elements must be constants.
template <int SLOT, int SLOTS> struct Slots {
  template <typename E, typename T, typename C, int D, int PER, int GROUP>
  METAL_FUNC static void run(
      const thread E& encoder, const device T* row, const device float* hartley, const threadgroup float* book, uint j,
      thread float* y, thread C& codes, thread bool& bad, device T* scales) {
    constexpr int TWO = D & -D;
    constexpr int SIZE = D / TWO * PER / SLOTS;
    constexpr int SMALL = GROUP < TWO ? GROUP : TWO;
    float scale = encoder.template encode<SLOT * SIZE, (SLOT + 1) * SIZE, SMALL / PER, false>(
        row, hartley, book, j, 0u, y, codes, bad);
    if (j * PER % SMALL == 0) { scales[element_of<D, PER>(SLOT * SIZE, j) / uint(GROUP)] = static_cast<T>(scale); }
    Slots<SLOT + 1, SLOTS>::template run<E, T, C, D, PER, GROUP>(encoder, row, hartley, book, j, y, codes, bad, scales);
  }
};
template <int SLOTS> struct Slots<SLOTS, SLOTS> {
  template <typename E, typename T, typename C, int D, int PER, int GROUP>
  METAL_FUNC static void run(
      const thread E&, const device T*, const device float*, const threadgroup float*, uint, thread float*, thread C&,
      thread bool&, device T*) {}
};

// ==== body ====
constexpr int TWO = D & -D;
constexpr int ELEMENTS = D / TWO * PER;
constexpr uint LANES = TWO / PER;
constexpr uint ROWS = 32 / LANES;
constexpr bool MASKED = GROUP % PER != 0 || (TWO % GROUP != 0 && GROUP % TWO != 0);
constexpr int SLOTS = MASKED ? 1 : GROUP < TWO ? D / TWO : D / GROUP;
constexpr int WORDS = words_of_codes(BITS, D);
constexpr uint BAD_WORDS = (BLOCK + 31) / 32;
threadgroup float book[256];
threadgroup uchar bad_rows[BLOCK];
threadgroup float sums[CENTER ? THREADS * 8 : 1];

uint thread_ = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
uint block = threadgroup_position_in_grid.x;
ulong head = ulong(threadgroup_position_in_grid.z) * threadgroups_per_grid.y + threadgroup_position_in_grid.y;
ulong blocks = threadgroups_per_grid.x;
const device T* source = rows + (head * ulong(sizes[1]) + ulong(sizes[0]) + ulong(block) * BLOCK) * D;
ulong out = (head * blocks + block) * BLOCK;

for (uint i = thread_; i < 256u; i += THREADS) { book[i] = i < (1u << BITS) ? tables[i] : 0.0f; }
if (CENTER) {
  find_center<T, D, BLOCK, THREADS>(source, centers + (head * blocks + block) * D, sums, thread_);
} else {
  if (head == 0 && block == 0 && thread_ < 8) { centers[thread_] = static_cast<T>(0.0f); }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

uint j = lane % LANES;
Encoder<T, D, PER, BITS, GROUP, CENTER, SCALINGS, TERMS> encoder;
encoder.template prepare<BALANCE>(signs, balance + (BALANCE ? head * ulong(D) : 0), tables, sums, j, lane);
for (uint first = simdgroup_index_in_threadgroup * ROWS; first < uint(BLOCK); first += THREADS / 32 * ROWS) {
  uint row = first + lane / LANES;
  const device T* from = source + row * D;
  device T* to = scales + (out + row) * (D / GROUP);
  float y[ELEMENTS];
  Codes<BITS, ELEMENTS> packed;
  bool bad_row = false;
  packed.clear();
  encoder.template read<false>(from, hartley, j, y, bad_row);
  if (MASKED) {
    for (uint group = 0; group < uint(D / GROUP); group++) {
      float scale =
          encoder.template encode<0, ELEMENTS, int(LANES), true>(from, hartley, book, j, group, y, packed, bad_row);
      if (j == 0) { to[group] = static_cast<T>(scale); }
    }
  } else {
    Slots<0, SLOTS>::template run<decltype(encoder), T, Codes<BITS, ELEMENTS>, D, PER, GROUP>(
        encoder, from, hartley, book, j, y, packed, bad_row, to);
  }
  store_codes<D, PER, BITS>(codes + (out + row) * WORDS, j, packed);
  if (j == 0) { bad_rows[row] = bad_row ? 1 : 0; }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint word = thread_; word < BAD_WORDS; word += THREADS) {
  uint bits = 0;
  for (uint r = 0; r < 32 && word * 32 + r < uint(BLOCK); r++) { bits |= uint(bad_rows[word * 32 + r]) << r; }
  bad[(head * blocks + block) * BAD_WORDS + word] = bits;
}
