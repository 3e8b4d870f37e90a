// Execution runtime for MSL compute kernels on the CPU.
// One OS thread; every GPU thread is a fiber; a threadgroup runs at a time.
//  * threadgroup_barrier / simdgroup_barrier / simd_* are scheduling points
//  * divergence and barrier misuse are detected at those points
//  * when the kernel is built with -fsanitize=thread, the compiler's memory
//    callbacks land here: bounds, alignment, data-race and uninitialised-read
//    checks with exact Metal barrier semantics (mem_flags aware)
// Freestanding on purpose: no C or C++ headers are needed to build it.
typedef __UINT8_TYPE__ uint8_t; typedef __UINT16_TYPE__ uint16_t; typedef __UINT32_TYPE__ uint32_t; typedef __UINT64_TYPE__ uint64_t;
typedef __INT32_TYPE__ int32_t; typedef __INT64_TYPE__ int64_t; typedef __UINTPTR_TYPE__ uintptr_t; typedef __SIZE_TYPE__ size_t;
#define INT64_MAX __INT64_MAX__
extern "C" {
void* mmap(void*, size_t, int, int, int, long); int munmap(void*, size_t);
void* memcpy(void*, const void*, size_t); void* memmove(void*, const void*, size_t); void* memset(void*, int, size_t);
int snprintf(char*, size_t, const char*, ...); [[noreturn]] void abort(); int raise(int); void (*signal(int, void (*)(int)))(int);
void* calloc(size_t, size_t); void free(void*);
// glibc and musl, x86-64 and aarch64
struct siginfo_t { int si_signo, si_errno, si_code, pad; void* si_addr; };
struct SigAction { void (*handler)(int, siginfo_t*, void*); unsigned long mask[16]; int flags; void (*restorer)(); };
struct SigStack { void* sp; int flags; size_t size; };
int sigaction(int, const SigAction*, SigAction*); int sigaltstack(const SigStack*, SigStack*);
}
enum { PROT_READ = 1, PROT_WRITE = 2, MAP_PRIVATE = 2, MAP_ANONYMOUS = 0x20, MAP_NORESERVE = 0x4000, SIGBUS = 7, SIGFPE = 8, SIGSEGV = 11, SA_SIGINFO = 4, SA_ONSTACK = 0x08000000, SA_NODEFER = 0x40000000 };
#define SIG_DFL nullptr
template <class T> struct Array { T* p; Array(size_t n) : p((T*)calloc(n ? n : 1, sizeof(T))) {} ~Array() { free(p); } T& operator[](size_t i) { return p[i]; } };

typedef uint32_t u32; typedef uint64_t u64;
struct U3 { u32 x, y, z; };
extern "C" {
// must match the thunk emitted by codegen.py
struct MslCtx {
  U3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  U3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  u32 thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      dispatch_simdgroups_per_threadgroup;
};
typedef void (*Entry)(void** bufs, const MslCtx* c);
struct BufDesc { void* user; u64 bytes; int32_t kind; /*0 in,1 out,2 raw(const bytes)*/ int32_t init; u32 offset, pad; };
struct Report { int32_t kind; u32 thread, other; u32 tg; u64 pc, pc2; int64_t off; int32_t buf, size; int32_t line, col, line2, col2; char msg[160]; };
struct RunArgs {
  Entry entry; int32_t nbuf; BufDesc* bufs; u32 grid[3], tg[3];
  int32_t check, strict, order; u32 seed; void* tg_lo; u64 tg_bytes; int32_t ntgv; u64* tgv; /* off,size pairs */
  Report* reports; int32_t max_reports, nreports; u64 stat_switches, stat_collectives, stat_barriers, stat_accesses; u64* unwritten; u64 so_base, so_end; int32_t ftz, pad_;
};
}
enum { K_OOB = 1, K_RACE, K_UNINIT, K_DIVERGE, K_ALIGN, K_ROWRITE, K_SHUFFLE, K_BARRIER, K_UB, K_UNWRITTEN };
enum St : int { READY, W_SIMD, W_SG, W_TG, DONE };

// ---------------------------------------------------------------- context switch
#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");
extern "C" void msl_switch(void** save, void* to);
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,%function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size msl_switch,.-msl_switch
)");
extern "C" void msl_switch(void** save, void* to);
#else
#error "add a context switch for this architecture"
#endif

static const size_t STACK = 128 * 1024;
static const int MAXT = 1024, MAXSG = 32, SLOT = 64;
struct Fiber { void* sp; St st; int line, col, kind, arg; u32 lin; u32 gid; u32 size; void (*fn)(const void*, void*, unsigned); alignas(64) char val[SLOT]; MslCtx ctx; };
struct Sg { int n, live, waiting; alignas(64) char in[32 * SLOT]; alignas(64) char out[32 * SLOT]; };
static char* arena; static uintptr_t arena_lo; static size_t arena_sz;
static Fiber* F; static Sg* G;
static int nthreads, nsg; static Fiber* cur; static void* main_sp; static bool aborting;
static RunArgs* R; static void** g_bufs; static u32 cur_tg;
static int perm[32];

// ---------------------------------------------------------------- checker state
struct Cell { u32 wt, we, wpc, rt, re, rpc, rt2, re2; };
struct Region { uintptr_t lo, hi; int kind; int buf; int space; Cell* cells; };  // kind 0 in,1 out,2 tg, 3 ignore
static Region regs[64]; static int nregs; static Region* last_reg;
static u32 E_tg[2]; static u32 E_sg[MAXSG][2];  // [space] 0 device 1 threadgroup
static Cell* tg_cells; 
static u64 so_lo, so_hi;
static u64 n_acc;

static Report* rep(int kind) {
  if (R->nreports < R->max_reports) {
    Report* r = &R->reports[R->nreports++]; memset(r, 0, sizeof *r); r->kind = kind; r->buf = -1;
    if (cur) { r->thread = cur->lin; r->line = cur->line; r->col = cur->col; }
    r->tg = cur_tg; return r;
  }
  static Report dummy; return &dummy;
}
[[noreturn]] static void abort_run() { aborting = true; void* junk; msl_switch(&junk, main_sp); __builtin_unreachable(); }

static inline Fiber* next_ready(int sg, int lane) {
  Fiber* b = F + sg * 32; int n = G[sg].n;
  for (int k = 1; k <= n; k++) { int l = lane + k; if (l >= n) l -= n; if (b[l].st == READY) return b + l; }
  return nullptr;
}
static void yield_to(Fiber* me, Fiber* to) {
  R->stat_switches++;
  if (to == me) { cur = me; return; }
  cur = to; void* t = to ? to->sp : main_sp;
  msl_switch(&me->sp, t);
}
enum { SH_ABS = 0, SH_DOWN, SH_UP, SH_XOR, SH_BCAST, SH_ROTD, SH_ROTU };
static void resolve(int sg, u32 mask) {
  Sg& g = G[sg]; Fiber* b = F + sg * 32; R->stat_collectives++;
  int first = __builtin_ctz(mask); u32 sz = b[first].size; auto fn = b[first].fn;
  if (b[first].st == W_SG) {
    int fl = b[first].arg; if (fl & 1) E_sg[sg][0]++; if (fl & 2) E_sg[sg][1]++;
  } else {
    for (int l = 0; l < g.n; l++) if ((mask >> l) & 1) memcpy(g.in + l * sz, b[l].val, sz);
    if (fn) fn(g.in, g.out, mask);
    else
    for (int l = 0; l < g.n; l++) if ((mask >> l) & 1) {
      int a = b[l].arg, s = l; bool keep = false;
      switch (b[l].kind) {
        case SH_ABS: s = a; break;
        case SH_DOWN: s = l + a; if (s > 31) { keep = true; } break;
        case SH_UP: s = l - a; if (s < 0) { keep = true; } break;
        case SH_XOR: s = l ^ a; break;
        case SH_BCAST: s = a < 0 ? first : a; if (a != b[first].arg) { cur = b + l; Report* r = rep(K_SHUFFLE); snprintf(r->msg, sizeof r->msg, "simd_broadcast lane id differs between lanes (%d vs %d)", a, b[first].arg); } break;
        case SH_ROTD: s = (l + a) & 31; break;
        case SH_ROTU: s = (l - a) & 31; break;
      }
      if (keep) s = l;
      if (s < 0 || s > 31 || !((mask >> s) & 1)) {
        cur = b + l; Report* r = rep(K_SHUFFLE);
        snprintf(r->msg, sizeof r->msg, "lane %d reads lane %d, which is out of range or inactive", l, s);
        memset(g.out + l * sz, 0xCD, sz);
      } else memcpy(g.out + l * sz, g.in + s * sz, sz);
    }
    for (int l = 0; l < g.n; l++) if ((mask >> l) & 1) memcpy(b[l].val, g.out + l * sz, sz);
  }
  for (int l = 0; l < g.n; l++) if ((mask >> l) & 1) b[l].st = READY;
  g.waiting -= __builtin_popcount(mask);
}
static inline void block(St st, int line, int col) {
  Fiber* me = cur; me->st = st; me->line = line; me->col = col;
  int sg = me->lin >> 5;
  if (st != W_TG) {
    Sg& g = G[sg];
    if (++g.waiting == g.live) {  // everyone who still can has arrived: same site?
      Fiber* b = F + sg * 32; u32 mask = 0; bool ok = true;
      for (int l = 0; l < g.n; l++) if (b[l].st != DONE) { if (b[l].st != st || b[l].line != line || b[l].col != col) { ok = false; break; } mask |= 1u << l; }
      if (ok) { resolve(sg, mask); cur = me; return; }
    }
  }
  yield_to(me, next_ready(sg, me->lin & 31));
}
extern "C" unsigned __msl_lane() { return cur->lin & 31; }
extern "C" void __msl_simd_exchange(void* io, unsigned size, int src, int op, int line, int col) {
  Fiber* me = cur; memcpy(me->val, io, size); me->size = size; me->fn = nullptr; me->kind = op; me->arg = src;
  block(W_SIMD, line, col);
  memcpy(io, me->val, size);
}
extern "C" void __msl_simd_reduce(void* io, unsigned size, void (*fn)(const void*, void*, unsigned), int line, int col) {
  Fiber* me = cur; memcpy(me->val, io, size); me->size = size; me->fn = fn;
  block(W_SIMD, line, col);
  memcpy(io, me->val, size);
}
extern "C" void __msl_sg_barrier(int flags, int line, int col) { cur->arg = flags; block(W_SG, line, col); }
extern "C" void __msl_tg_barrier(int flags, int line, int col) { cur->arg = flags; block(W_TG, line, col); }

static void fiber_main() {
  for (;;) {
    Fiber* me = cur;
    R->entry(g_bufs, &me->ctx);
    me->st = DONE; Sg& g = G[me->lin >> 5]; g.live--;
    yield_to(me, next_ready(me->lin >> 5, me->lin & 31));
    abort();  // a DONE fiber is never resumed
  }
}
static void fiber_init(Fiber* f, char* stack) {
  uintptr_t top = (uintptr_t)(stack + STACK) & ~(uintptr_t)63;
#if defined(__x86_64__)
  void** sp = (void**)(top - 8); *sp = nullptr; *--sp = (void*)&fiber_main;  // entry: rsp % 16 == 8 after ret
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f->sp = sp;
#else
  void** sp = (void**)(top - 160); memset(sp, 0, 160); sp[11] = (void*)&fiber_main; f->sp = sp;
#endif
}
static void diverged(int sg, const char* what) {
  Sg& g = G[sg]; Fiber* b = F + sg * 32; Fiber *x = nullptr, *y = nullptr;
  for (int l = 0; l < g.n; l++) if (b[l].st != DONE) { if (!x) x = b + l; else if (b[l].line != x->line || b[l].col != x->col || b[l].st != x->st) { y = b + l; break; } }
  cur = x; Report* r = rep(K_DIVERGE); if (y) { r->other = y->lin; r->line2 = y->line; r->col2 = y->col; }
  snprintf(r->msg, sizeof r->msg, "%s", what);
}
static void run_sg(int sg) {
  Sg& g = G[sg]; Fiber* b = F + sg * 32;
  for (;;) {
    Fiber* f = nullptr;
    for (int k = 0; k < 32; k++) { int l = perm[k]; if (l < g.n && b[l].st == READY) { f = b + l; break; } }
    if (!f) {
      // all blocked: lanes at simd sites and lanes at tg barriers / different sites
      u32 best = 0; int bl = 1 << 30, bc = 1 << 30; bool simd = false, mixed = false; Fiber* one = nullptr;
      for (int l = 0; l < g.n; l++) { Fiber& q = b[l]; if (q.st == DONE) continue;
        if (one && (q.st != one->st || q.line != one->line || q.col != one->col)) mixed = true; if (!one) one = &q;
        if (q.st == W_SIMD || q.st == W_SG) { simd = true; if (q.line < bl || (q.line == bl && q.col < bc)) { bl = q.line; bc = q.col; } } }
      if (!simd) return;
      if (mixed && R->strict) { diverged(sg, "lanes of one simdgroup wait at different simd operations / barriers"); aborting = true; return; }
      for (int l = 0; l < g.n; l++) if ((b[l].st == W_SIMD || b[l].st == W_SG) && b[l].line == bl && b[l].col == bc) best |= 1u << l;
      resolve(sg, best); continue;
    }
    cur = f; R->stat_switches++; msl_switch(&main_sp, f->sp); cur = nullptr;
    if (aborting) return;
  }
}
static u32 rng; static u32 rnd() { rng ^= rng << 13; rng ^= rng >> 17; rng ^= rng << 5; return rng; }

// ---------------------------------------------------------------- memory checks
static inline Region* find(uintptr_t a) {
  if (last_reg && a >= last_reg->lo && a < last_reg->hi) return last_reg;
  for (int i = 0; i < nregs; i++) if (a >= regs[i].lo && a < regs[i].hi) return last_reg = &regs[i];
  return nullptr;
}
static void oob(uintptr_t a, unsigned n, bool w, void* pc) {
  // nearest buffer for the message
  Region* best = nullptr; int64_t bd = INT64_MAX;
  for (int i = 0; i < nregs; i++) { if (regs[i].kind == 3) continue; int64_t d = a < regs[i].lo ? (int64_t)(regs[i].lo - a) : a >= regs[i].hi ? (int64_t)(a - regs[i].hi) : 0; if (d < bd) { bd = d; best = &regs[i]; } }
  Report* r = rep(K_OOB); r->pc = (u64)pc - so_lo; r->size = n; if (best) { r->buf = best->buf; r->off = (int64_t)(a - best->lo); }
  snprintf(r->msg, sizeof r->msg, "out-of-bounds %s of %u bytes", w ? "write" : "read", n);
  abort_run();
}
static inline bool ordered(u32 pt, u32 pe, u32 ct, int space) {
  if (pt == ct) return true;
  if (pt / MAXT != ct / MAXT) return false;                   // other threadgroup
  if ((pe >> 16) < (E_tg[space] & 0xffff)) return true;        // threadgroup_barrier in between
  u32 ps = (pt % MAXT) >> 5, cs = (ct % MAXT) >> 5;
  return ps == cs && (pe & 0xffff) < (E_sg[cs][space] & 0xffff);
}
static void race(Region* g, uintptr_t a, unsigned n, bool w, void* pc, u32 ot, u32 opc, const char* what) {
  for (int i = 0; i < R->nreports; i++) { Report& q = R->reports[i]; if (q.kind == K_RACE && q.pc == (u64)pc - so_lo && q.pc2 == opc) return; }
  Report* r = rep(K_RACE); r->pc = (u64)pc - so_lo; r->pc2 = opc; r->buf = g->buf; r->off = (int64_t)(a - g->lo); r->size = n; r->other = ot % MAXT;
  snprintf(r->msg, sizeof r->msg, "data race (%s)%s", what, ot / MAXT != cur->gid / MAXT ? " with another threadgroup" : "");
}
static inline void access(void* p, unsigned n, bool w, bool aligned, void* pc) {
  uintptr_t a = (uintptr_t)p;
  if (a - arena_lo < arena_sz) return;
  if (!R || !R->check || !cur) return;
  n_acc++;
  Region* g = find(a);
  if (!g || a + n > g->hi) { if (g && g->kind == 3) return; oob(a, n, w, pc); return; }
  if (g->kind == 3) return;
  if (aligned && (a & (n - 1))) { Report* r = rep(K_ALIGN); r->pc = (u64)pc - so_lo; r->buf = g->buf; r->off = a - g->lo; r->size = n; snprintf(r->msg, sizeof r->msg, "misaligned %u-byte %s", n, w ? "write" : "read"); abort_run(); }
  if (g->kind == 0) { if (w) { Report* r = rep(K_ROWRITE); r->pc = (u64)pc - so_lo; r->buf = g->buf; r->off = a - g->lo; snprintf(r->msg, sizeof r->msg, "write to an input buffer"); abort_run(); } return; }
  int sp = g->space; u32 me = cur->gid; u32 ep = (E_tg[sp] << 16) | (E_sg[cur->lin >> 5][sp] & 0xffff); u32 pco = (u32)((u64)pc - so_lo);
  Cell* c = g->cells + (a - g->lo); u32 mytg = me / MAXT;
  for (unsigned i = 0; i < n; i++, c++) {
    bool fresh = c->wt == 0 || (sp == 1 && (c->wt - 1) / MAXT != mytg);   // never written (in this threadgroup)
    if (!fresh && c->wt != 0xffffffffu && !ordered(c->wt - 1, c->we, me, sp)) { race(g, a + i, n, w, pc, c->wt - 1, c->wpc, w ? "write after write" : "read after write"); }
    if (w) {
      if (c->rt && !(sp == 1 && (c->rt - 1) / MAXT != mytg)) {
        if (!ordered(c->rt - 1, c->re, me, sp)) race(g, a + i, n, w, pc, c->rt - 1, c->rpc, "write after read");
        else if (c->rt2 && !ordered(c->rt2 - 1, c->re2, me, sp)) race(g, a + i, n, w, pc, c->rt2 - 1, c->rpc, "write after read");
      }
      c->wt = me + 1; c->we = ep; c->wpc = pco; c->rt = c->rt2 = 0;
    } else {
      if (fresh && !(sp == 0 && g->kind == 1 && R->bufs[g->buf].init)) {
        bool dup = false; for (int k = 0; k < R->nreports; k++) if (R->reports[k].kind == K_UNINIT && R->reports[k].pc == pco) dup = true;
        if (!dup) { Report* r = rep(K_UNINIT); r->pc = pco; r->buf = g->buf; r->off = a + i - g->lo; r->size = n; snprintf(r->msg, sizeof r->msg, "read of %s memory that was never written", sp ? "threadgroup" : "output"); }
      }
      u32 m1 = me + 1;
      if (c->rt == m1 || !c->rt) { c->rt = m1; c->re = ep; c->rpc = pco; }
      else if (c->re != ep && ordered(c->rt - 1, c->re, me, sp)) { c->rt = m1; c->re = ep; c->rpc = pco; c->rt2 = 0; }
      else if (!c->rt2 || ((c->rt2 - 1) >> 5) == ((c->rt - 1) >> 5)) { c->rt2 = m1; c->re2 = ep; }
    }
  }
}
#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define RW(n) void __tsan_read##n(void* p) { access(p, n, false, true, PC); } void __tsan_write##n(void* p) { access(p, n, true, true, PC); } \
  void __tsan_read_write##n(void* p) { access(p, n, false, true, PC); access(p, n, true, true, PC); }
RW(1) RW(2) RW(4) RW(8) RW(16)
#define URW(n) void __tsan_unaligned_read##n(void* p) { access(p, n, false, false, PC); } void __tsan_unaligned_write##n(void* p) { access(p, n, true, false, PC); }\
  void __tsan_unaligned_read_write##n(void* p) { access(p, n, false, false, PC); access(p, n, true, false, PC); }
URW(2) URW(4) URW(8) URW(16)
void* __tsan_memcpy(void* d, const void* s, size_t n) { if (n) { access((void*)s, n, false, false, PC); access(d, n, true, false, PC); } return memcpy(d, s, n); }
void* __tsan_memmove(void* d, const void* s, size_t n) { if (n) { access((void*)s, n, false, false, PC); access(d, n, true, false, PC); } return memmove(d, s, n); }
void* __tsan_memset(void* d, int v, size_t n) { if (n) access(d, n, true, false, PC); return memset(d, v, n); }
void __msl_atomic(const volatile void* p, unsigned size) {
  if (!R->check) return; uintptr_t a = (uintptr_t)p; Region* g = find(a);
  if (!g || a + size > g->hi) oob(a, size, true, PC);
  if (g->kind == 1 || g->kind == 2) for (unsigned i = 0; i < size; i++) g->cells[a - g->lo + i].wt = 0xffffffffu;
}
// UBSan handlers (the compiler passes a struct that starts with {file,line,col})
struct SrcLoc { const char* file; u32 line, col; };
static void ub(const SrcLoc* l, const char* what) {
  for (int i = 0; R && i < R->nreports; i++) if (R->reports[i].kind == K_UB && R->reports[i].line == (int)l->line && R->reports[i].col == (int)l->col) return;
  if (!R) return; Report* r = rep(K_UB); r->line = l->line; r->col = l->col; snprintf(r->msg, sizeof r->msg, "%s (%s)", what, l->file ? l->file : "?");
}
#define UB(n, text) void __ubsan_handle_##n(SrcLoc* l) { ub(l, text); } void __ubsan_handle_##n##_abort(SrcLoc* l) { ub(l, text); abort_run(); }
UB(add_overflow, "signed integer overflow in +") UB(sub_overflow, "signed integer overflow in -") UB(mul_overflow, "signed integer overflow in *")
UB(negate_overflow, "signed integer overflow in unary -") UB(divrem_overflow, "division overflow or division by zero") UB(shift_out_of_bounds, "shift amount or result out of range")
UB(vla_bound_not_positive, "bad array size") UB(load_invalid_value, "invalid bool/enum value")
UB(type_mismatch_v1, "null or misaligned pointer use") UB(pointer_overflow, "pointer arithmetic overflow") 
UB(float_cast_overflow, "float value does not fit the integer type") UB(nonnull_arg, "null argument") UB(invalid_builtin, "bad builtin argument")
#define UBX(n, text) void __ubsan_handle_##n(SrcLoc* l) { ub(l, text); abort_run(); } void __ubsan_handle_##n##_abort(SrcLoc* l) { ub(l, text); abort_run(); }
UBX(builtin_unreachable, "unreachable reached") UBX(missing_return, "missing return")
UBX(out_of_bounds, "array index out of bounds")
UB(implicit_conversion, "implicit conversion changes value")
// half / bfloat conversion helpers that libgcc 12 lacks (bf16) or that -mno-f16c would need
static inline u32 fbits(float f) { u32 u; memcpy(&u, &f, 4); return u; }
static inline u32 bf(float f) { u32 u = fbits(f); if ((u & 0x7fffffff) > 0x7f800000) return ((u >> 16) | 0x40) & 0xffff; return ((u + 0x7fff + ((u >> 16) & 1)) >> 16) & 0xffff; }
#if defined(__clang__)
__bf16 __truncsfbf2(float f) { uint16_t h = (uint16_t)bf(f); __bf16 r; memcpy(&r, &h, 2); return r; }
__bf16 __truncdfbf2(double d) { return __truncsfbf2((float)d); }
#endif

static Cell* cells_for(u64 n) { if (!n) n = 1; Cell* c = (Cell*)mmap(nullptr, n * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); return c; }

static void on_crash(int sig, siginfo_t* si, void*) {
  if (!R || !cur) { signal(sig, SIG_DFL); raise(sig); return; }
  Report* r = rep(K_OOB); snprintf(r->msg, sizeof r->msg, "crash (signal %d) accessing %p", sig, si->si_addr); abort_run();
}
static SigAction old_sa[3]; static const int sigs[3] = {SIGSEGV, SIGBUS, SIGFPE};
static void guard_on() {
  static char* alt = nullptr; if (!alt) alt = (char*)mmap(nullptr, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  SigStack st = {alt, 0, 65536}; sigaltstack(&st, nullptr);
  SigAction sa = {}; sa.handler = on_crash; sa.flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 3; i++) sigaction(sigs[i], &sa, &old_sa[i]);
}
static void guard_off() { for (int i = 0; i < 3; i++) sigaction(sigs[i], &old_sa[i], nullptr); }
int msl_run(RunArgs* a) {
  R = a; a->nreports = 0; aborting = false; cur = nullptr; nregs = 0; last_reg = nullptr; n_acc = 0;
  a->stat_switches = a->stat_collectives = a->stat_barriers = 0;
  if (!arena) {
    arena_sz = STACK * MAXT + sizeof(Fiber) * MAXT + sizeof(Sg) * MAXSG + (1 << 16);
    arena = (char*)mmap(nullptr, arena_sz, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    arena_lo = (uintptr_t)arena; char* q = arena + STACK * MAXT; F = (Fiber*)q; q += (sizeof(Fiber) * MAXT + 63) & ~63ul; G = (Sg*)q;
  }
  so_lo = a->so_base; so_hi = a->so_end;
  // private copies of the buffers, surrounded by guard gaps
  const size_t GUARD = 4096; Array<void*> ptr(a->nbuf), raw(a->nbuf); Array<size_t> rawsz(a->nbuf); struct Cells { Cell* first; u64 second; }; Array<Cells> cl(a->nbuf + 1); int ncl = 0;
  for (int i = 0; i < a->nbuf; i++) {
    BufDesc& b = a->bufs[i]; rawsz[i] = b.bytes + 2 * GUARD + 256;
    char* m = (char*)mmap(nullptr, rawsz[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); raw[i] = m; memset(m, 0xCB, rawsz[i]);
    char* p = m + GUARD + b.offset; ptr[i] = p;
    if (b.kind != 1 || b.init) memcpy(p, b.user, b.bytes); else memset(p, 0xCB, b.bytes);
    Region& r = regs[nregs++]; r.lo = (uintptr_t)p; r.hi = r.lo + b.bytes; r.buf = i; r.space = 0; r.kind = b.kind == 1 ? 1 : 0; r.cells = nullptr;
    if (a->check && b.kind == 1) { r.cells = cells_for(b.bytes); cl[ncl++] = {r.cells, b.bytes}; }
  }
  uintptr_t tlo = (uintptr_t)a->tg_lo;
  Cell* tgc = nullptr;
  if (a->tg_bytes && a->check) { tgc = cells_for(a->tg_bytes); cl[ncl++] = {tgc, a->tg_bytes}; }
  for (int i = 0; i < a->ntgv && nregs < 60; i++) { Region& r = regs[nregs++]; r.lo = tlo + a->tgv[2 * i]; r.hi = r.lo + a->tgv[2 * i + 1]; r.kind = 2; r.space = 1; r.buf = 1000 + i; r.cells = tgc + a->tgv[2 * i]; }
  // rest of the kernel image (constant tables): accept, except the threadgroup section
  if (a->tg_bytes) { Region& r = regs[nregs++]; r.lo = so_lo; r.hi = tlo; r.kind = 3; r.buf = -1; Region& s = regs[nregs++]; s.lo = tlo + a->tg_bytes; s.hi = so_hi; s.kind = 3; s.buf = -1; }
  else { Region& r = regs[nregs++]; r.lo = so_lo; r.hi = so_hi; r.kind = 3; r.buf = -1; }
  g_bufs = ptr.p; guard_on();
#if defined(__x86_64__)
  unsigned csr = __builtin_ia32_stmxcsr(); if (a->ftz) __builtin_ia32_ldmxcsr(csr | 0x8040);
#endif
  u32 gd[3], td[3], ng[3];
  for (int i = 0; i < 3; i++) { gd[i] = a->grid[i]; td[i] = a->tg[i] < gd[i] ? a->tg[i] : gd[i]; ng[i] = (gd[i] + td[i] - 1) / td[i]; }
  u32 total = ng[0] * ng[1] * ng[2]; rng = a->seed * 2654435761u + 88172645u; u32 tgi = 0;
  Array<u32> order(total); for (u32 i = 0; i < total; i++) order[i] = i;
  if (a->order == 1) for (u32 i = 0; i < total; i++) order[i] = total - 1 - i;
  if (a->order == 2) for (u32 i = total - 1; i > 0; i--) { u32 j = rnd() % (i + 1); u32 t = order[i]; order[i] = order[j]; order[j] = t; }
  for (u32 oi = 0; oi < total && !aborting; oi++) {
    u32 t = order[oi]; u32 bx = t % ng[0], by = (t / ng[0]) % ng[1], bz = t / (ng[0] * ng[1]); cur_tg = t; tgi = oi + 1;
    u32 d[3] = {td[0], td[1], td[2]}, bi[3] = {bx, by, bz};
    for (int i = 0; i < 3; i++) if ((bi[i] + 1) * td[i] > gd[i]) d[i] = gd[i] - bi[i] * td[i];   // non-uniform edge group
    nthreads = d[0] * d[1] * d[2]; nsg = (nthreads + 31) / 32;
    if (a->tg_bytes) memset(a->tg_lo, 0xCB, a->tg_bytes);     // threadgroup memory starts as garbage
    E_tg[0] = E_tg[1] = 1; for (int s = 0; s < MAXSG; s++) E_sg[s][0] = E_sg[s][1] = 1;
    for (int s = 0; s < nsg; s++) { G[s].n = G[s].live = (s == nsg - 1) ? nthreads - 32 * s : 32; G[s].waiting = 0; }
    for (int i = 0; i < nthreads; i++) {
      Fiber& f = F[i]; f.st = READY; f.lin = i; f.gid = tgi * MAXT + i; f.line = f.col = 0; MslCtx& c = f.ctx;
      u32 x = i % d[0], y = (i / d[0]) % d[1], z = i / (d[0] * d[1]);
      c.thread_position_in_threadgroup = {x, y, z}; c.threadgroup_position_in_grid = {bx, by, bz};
      c.thread_position_in_grid = {bx * td[0] + x, by * td[1] + y, bz * td[2] + z};
      c.threads_per_threadgroup = {d[0], d[1], d[2]}; c.dispatch_threads_per_threadgroup = {td[0], td[1], td[2]};
      c.threadgroups_per_grid = {ng[0], ng[1], ng[2]}; c.threads_per_grid = {gd[0], gd[1], gd[2]};
      c.thread_index_in_threadgroup = i; c.thread_index_in_simdgroup = i & 31; c.simdgroup_index_in_threadgroup = i >> 5;
      c.simdgroups_per_threadgroup = nsg; c.dispatch_simdgroups_per_threadgroup = (td[0] * td[1] * td[2] + 31) / 32;
      fiber_init(&f, arena + STACK * i);
    }
    for (;;) {
      int sgo[MAXSG]; for (int i = 0; i < nsg; i++) sgo[i] = i; for (int i = 0; i < 32; i++) perm[i] = i;
      if (a->order == 1) { for (int i = 0; i < nsg; i++) sgo[i] = nsg - 1 - i; for (int i = 0; i < 32; i++) perm[i] = 31 - i; }
      if (a->order == 2) { for (int i = nsg - 1; i > 0; i--) { int j = rnd() % (i + 1); int q = sgo[i]; sgo[i] = sgo[j]; sgo[j] = q; } for (int i = 31; i > 0; i--) { int j = rnd() % (i + 1); int q = perm[i]; perm[i] = perm[j]; perm[j] = q; } }
      for (int i = 0; i < nsg && !aborting; i++) run_sg(sgo[i]);
      if (aborting) break;
      int done = 0, fl = 0; Fiber* w = nullptr; Fiber* bad = nullptr;
      for (int i = 0; i < nthreads; i++) { if (F[i].st == DONE) { done++; continue; } if (!w) { w = &F[i]; fl = w->arg; } else if (F[i].line != w->line || F[i].col != w->col) bad = &F[i]; else fl &= F[i].arg; }
      if (done == nthreads) break;
      if (bad) { cur = w; Report* r = rep(K_BARRIER); r->other = bad->lin; r->line2 = bad->line; r->col2 = bad->col; snprintf(r->msg, sizeof r->msg, "threads wait at different threadgroup_barrier calls"); if (a->strict) { aborting = true; break; } }
      if (done && a->strict) { cur = w; Report* r = rep(K_BARRIER); snprintf(r->msg, sizeof r->msg, "threadgroup_barrier reached by only %d of %d threads (the others returned)", nthreads - done, nthreads); aborting = true; break; }
      a->stat_barriers++; if (fl & 1) { E_tg[0]++; } if (fl & 2) { E_tg[1]++; }
      if (E_tg[0] > 65000 || E_tg[1] > 65000) { Report* r = rep(K_BARRIER); snprintf(r->msg, sizeof r->msg, "checker: more than 65000 barriers in one threadgroup, race check incomplete"); a->check = 0; E_tg[0] = E_tg[1] = 1; }
      for (int i = 0; i < nthreads; i++) if (F[i].st == W_TG) F[i].st = READY;
    }
    cur = nullptr;
  }
  guard_off();
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(csr);
#endif
  for (int i = 0; i < a->nbuf; i++) {
    BufDesc& b = a->bufs[i]; char* p = (char*)ptr[i];
    if (b.kind == 1) { memcpy(b.user, p, b.bytes); if (a->check && a->unwritten) { u64 n = 0; Cell* c = regs[i].cells; if (!b.init) for (u64 k = 0; k < b.bytes; k++) n += c[k].wt == 0; a->unwritten[i] = n; } }
    // guard gaps (also catches stray writes in uninstrumented builds)
    char* m = (char*)raw[i]; for (size_t k = 0; k < GUARD; k++) if ((unsigned char)m[k] != 0xCB || (unsigned char)m[GUARD + b.offset + b.bytes + k] != 0xCB) { Report* r = rep(K_OOB); r->buf = i; snprintf(r->msg, sizeof r->msg, "guard bytes around the buffer were overwritten"); break; }
    munmap(m, rawsz[i]);
  }
  for (int i = 0; i < ncl; i++) munmap(cl[i].first, (cl[i].second ? cl[i].second : 1) * sizeof(Cell));
  a->stat_accesses = n_acc; R = nullptr; return aborting ? 1 : 0;
}
}
