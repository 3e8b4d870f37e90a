// The rotation T diag(signs) of mlx_turboquant/rotation.py, for one row of D values held by one simdgroup.
//
// D = ODD * TWO with TWO the largest power of two in D; T is the Kronecker product of the ODD-point Hartley matrix and
// the Walsh-Hadamard matrix of size TWO, both normalised: symmetric and its own inverse. Value e * 32 + lane of the row
// is x[e] of that lane; values from D on are 0 and stay 0. All 32 lanes take part. TWO is 16 or more.

// x <- T x. hartley: (ODD, ODD) row by row; not read when ODD is 1.
template <int D> METAL_FUNC void hadamard_hartley(thread float* x, const device float* hartley, uint lane) {
  constexpr int TWO = D & -D;
  constexpr int ODD = D / TWO;
  constexpr int E = (D + 31) / 32;
  for (uint step = 1; step < 32 && step < uint(TWO); step *= 2) {
    bool upper = (lane & step) != 0;
    for (int e = 0; e < E; e++) {
      float other = simd_shuffle_xor(x[e], ushort(step));
      x[e] = upper ? other - x[e] : x[e] + other;
    }
  }
  for (int step = 1; step * 32 < TWO; step *= 2) {
    for (int e = 0; e < E; e++) {
      if ((e & step) == 0) {
        float a = x[e], b = x[(e + step) % E];  // e + step < E: a power of two divides TWO / 32
        x[e] = a + b;
        x[(e + step) % E] = a - b;
      }
    }
  }
  float norm = metal::rsqrt(float(TWO));
  if (ODD == 1) {
    for (int e = 0; e < E; e++) { x[e] *= norm; }
    return;
  }
  // Value o * TWO + i of the row, for every o, from the lanes that hold this lane's i.
  float part[ODD];
  if (TWO == 16) {
    uint half_ = lane >> 4;
    for (int e = 0; e < E; e++) {
      float other = simd_shuffle_xor(x[e], ushort(16));
      if (2 * e < ODD) { part[(2 * e) % ODD] = half_ == 0 ? x[e] : other; }
      if (2 * e + 1 < ODD) { part[(2 * e + 1) % ODD] = half_ == 0 ? other : x[e]; }
    }
    for (int e = 0; e < E; e++) {
      uint o = 2 * uint(e) + half_;
      float sum = 0.0f;
      if (o < uint(ODD)) {
        for (int j = 0; j < ODD; j++) { sum += hartley[o * ODD + j] * part[j]; }
      }
      x[e] = sum * norm;
    }
  } else {
    constexpr int SPAN = TWO / 32 > 0 ? TWO / 32 : 1;  // values of one o that a lane holds
    for (int s = 0; s < SPAN; s++) {
      for (int o = 0; o < ODD; o++) { part[o] = x[(o * SPAN + s) % E]; }
      for (int o = 0; o < ODD; o++) {
        float sum = 0.0f;
        for (int j = 0; j < ODD; j++) { sum += hartley[o * ODD + j] * part[j]; }
        x[(o * SPAN + s) % E] = sum * norm;
      }
    }
  }
}
