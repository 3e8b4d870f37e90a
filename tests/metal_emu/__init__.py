"""Run Metal kernel bodies on the CPU, with every memory access checked.

    from metal_emu import metal_kernel      # the same call as mx.fast.metal_kernel, mx or numpy arrays
    kernel = metal_kernel(name=..., input_names=..., output_names=..., source=..., header=...)
    call = dict(inputs=[...], template=[...], grid=..., threadgroup=..., output_shapes=..., output_dtypes=...)
    kernel(**call, check=True)              # KernelError lists races, out-of-bounds, uninitialised reads, divergence
    kernel.typecheck(**call)                # only type-checks; inputs may be (shape, dtype); CompileError or warnings
    kernel.metal_source(**call)             # the text that MLX would compile
    typecheck([(kernel, call), ...])        # many at once
    prebuild([(kernel, call), ...])         # compiles many in two processes, before they run

Options of a call, or of ``metal_kernel``: ``check``, ``strict``, ``order`` ("forward", "reverse", "random") with
``seed``, ``typecheck``, ``misalign``, ``ftz``, ``max_threadgroup_memory``, ``unwritten``, ``raise_errors``.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import numpy as np

from . import build, lint
from . import codegen as cg

try:
    import mlx.core as mx
except Exception:  # pragma: no cover
    mx = None
try:
    import ml_dtypes
except Exception:
    ml_dtypes = None

KINDS = {
    1: "out-of-bounds",
    2: "race",
    3: "uninitialised",
    4: "simd-divergence",
    5: "misaligned",
    6: "write-to-input",
    7: "simd-shuffle",
    8: "barrier",
    9: "undefined-behaviour",
    10: "unwritten-output",
}


CompileError = build.CompileError


class KernelError(RuntimeError):
    def __init__(self, name, reports, outputs=None):
        self.reports, self.outputs = reports, outputs
        super().__init__(f"{name}:\n" + "\n".join("  " + str(r) for r in reports))


class Report:
    def __init__(self, kind, text):
        self.kind, self.text = kind, text

    def __str__(self):
        return f"[{self.kind}] {self.text}"

    __repr__ = __str__


class U3(ctypes.Structure):
    _fields_ = [("v", ctypes.c_uint32 * 3)]


class BufDesc(ctypes.Structure):
    _fields_ = [
        ("user", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("init", ctypes.c_int32),
        ("offset", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class CReport(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("thread", ctypes.c_uint32),
        ("other", ctypes.c_uint32),
        ("tg", ctypes.c_uint32),
        ("pc", ctypes.c_uint64),
        ("pc2", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("buf", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("line", ctypes.c_int32),
        ("col", ctypes.c_int32),
        ("line2", ctypes.c_int32),
        ("col2", ctypes.c_int32),
        ("msg", ctypes.c_char * 160),
    ]


class RunArgs(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("nbuf", ctypes.c_int32),
        ("bufs", ctypes.POINTER(BufDesc)),
        ("grid", ctypes.c_uint32 * 3),
        ("tg", ctypes.c_uint32 * 3),
        ("check", ctypes.c_int32),
        ("strict", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("tg_lo", ctypes.c_void_p),
        ("tg_bytes", ctypes.c_uint64),
        ("ntgv", ctypes.c_int32),
        ("tgv", ctypes.POINTER(ctypes.c_uint64)),
        ("reports", ctypes.POINTER(CReport)),
        ("max_reports", ctypes.c_int32),
        ("nreports", ctypes.c_int32),
        ("stat_switches", ctypes.c_uint64),
        ("stat_collectives", ctypes.c_uint64),
        ("stat_barriers", ctypes.c_uint64),
        ("stat_accesses", ctypes.c_uint64),
        ("unwritten", ctypes.POINTER(ctypes.c_uint64)),
        ("so_base", ctypes.c_uint64),
        ("so_end", ctypes.c_uint64),
        ("ftz", ctypes.c_int32),
        ("pad_", ctypes.c_int32),
    ]


_loaded = {}


class Loaded:
    def __init__(self, path):
        build.runtime()
        self.path = path
        self.lib = ctypes.CDLL(path)
        secs, syms = build.elf_symbols(path)
        val = {n: v for n, v, s, x in syms}
        addr = ctypes.cast(self.lib.__getattr__("__msl_entry"), ctypes.c_void_p).value
        base = addr - val["__msl_entry"]
        self.entry, self.base = addr, base
        self.end = base + build.elf_end(path)
        self.tg_lo, self.tg_bytes, self.tgv, self.tgn = 0, 0, [], []
        if "msl_tg" in secs:
            a, sz, idx = secs["msl_tg"]
            self.tg_lo, self.tg_bytes = base + a, sz
            for n, v, s, x in syms:
                if x == idx and s and "__msl_rz_" not in n:
                    m = re.search(r"E(?:\d+)([A-Za-z_]\w*?)(?:_\d+)?$", n)
                    self.tgv.append((v - a, s))
                    self.tgn.append(re.sub(r".*E\d+", "", n) if not m else m.group(1))
        self.tg_used = sum((s + 15) & ~15 for _, s in self.tgv)


def load(path):
    if path not in _loaded:
        _loaded[path] = Loaded(path)
    return _loaded[path]


# ---------------------------------------------------------------- arrays
def _dtname(d):
    if isinstance(d, str):
        return {"bool_": "bool"}.get(d, d)
    if mx is not None and isinstance(d, mx.Dtype):
        return str(d).split(".")[-1].rstrip("_") if str(d).endswith("bool_") else str(d).split(".")[-1]
    return np.dtype(d).name


NP = {"bfloat16": np.uint16, "complex64": np.complex64}


def _np(x):
    """-> (contiguous numpy storage, dtype name)"""
    if mx is not None and isinstance(x, mx.array):
        n = _dtname(x.dtype)
        return (np.array(x.view(mx.uint16), copy=True), n) if n == "bfloat16" else (np.array(x, copy=True), n)
    if isinstance(x, bool):
        return np.array(x), "bool"
    if isinstance(x, int):
        return np.array(x, np.int32), "int32"
    if isinstance(x, float):
        return np.array(x, np.float32), "float32"
    a = np.ascontiguousarray(x)
    a = a.reshape(np.shape(x))
    if a.dtype.name == "bfloat16":
        return a.view(np.uint16), "bfloat16"
    return a, a.dtype.name


def _back(a, name, like_mx):
    if like_mx:
        return mx.array(a).view(mx.bfloat16) if name == "bfloat16" else mx.array(a)
    if name == "bfloat16" and ml_dtypes is not None:
        return a.view(ml_dtypes.bfloat16)
    return a


class _Kernel:
    def __init__(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
        compile_options=None,
        **emu,
    ):
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.name, self.input_names, self.output_names = name, list(input_names), list(output_names)
        self.source, self.header, self.atomic = source, header, atomic_outputs
        opts = dict(compile_options or {})
        mm = opts.pop("math_mode", "safe")
        if opts or mm not in ("safe", "relaxed", "fast"):
            raise ValueError("[metal_kernel] bad compile_options")
        self.math_mode = mm
        self.emu = {**defaults, **emu}

    def _args(self, arrs):
        return [cg.Arg(n, d, a.ndim, a.size) for n, (a, d) in zip(self.input_names, arrs, strict=False)]

    def _instance(self, inputs, output_dtypes, template=None, **_):
        args = []
        for n, x in zip(self.input_names, inputs, strict=False):
            if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], (tuple, list)):
                shape, d = x[0], _dtname(x[1])
            else:
                a, d = _np(x)
                shape = a.shape
            args.append(cg.Arg(n, d, len(shape), int(np.prod(shape))))
        tm = [(n, v if isinstance(v, (bool, int)) else _dtname(v)) for n, v in template or []]
        return (
            self.name,
            self.header,
            self.source,
            args,
            self.output_names,
            [_dtname(d) for d in output_dtypes],
            tm,
            self.atomic,
        )

    def metal_source(self, inputs, output_dtypes, template=None, **_):
        return cg.metal_source(*self._instance(inputs, output_dtypes, template))

    def typecheck(self, inputs, output_dtypes, template=None, **_):
        return lint.check(self, self._instance(inputs, output_dtypes, template))

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
        **emu,
    ):
        o = {**self.emu, **emu}
        for w, a, e in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", output_shapes, self.output_names),
            ("output_dtypes", output_dtypes, self.output_names),
        ):
            if len(a) != len(e):
                raise ValueError(f"[metal_kernel] Expected `{w}` to have size {len(e)} but got size {len(a)}.")
        like_mx = mx is not None and (
            o["mx"]
            if o["mx"] is not None
            else any(isinstance(x, mx.array) for x in inputs) or any(isinstance(d, mx.Dtype) for d in output_dtypes)
        )
        arrs = [_np(x) for x in inputs]
        args = self._args(arrs)
        od = [_dtname(d) for d in output_dtypes]
        tm = [(n, v if isinstance(v, (bool, int)) else _dtname(v)) for n, v in template or []]
        gargs = (self.name, self.header, self.source, args, self.output_names, od, tm, self.atomic)
        if verbose:
            print(cg.metal_source(*gargs))
        if any(d == "float64" for d in od + [a.dtype for a in args]):
            raise build.CompileError("Metal has no double")
        if o["typecheck"]:
            lint.check(self, gargs)
        mode = "check" if o["check"] else "fast"
        src, _ = cg.run_source(*gargs)
        L = load(build.compile_run(src, mode, math_mode=self.math_mode))
        tgn = threadgroup[0] * threadgroup[1] * threadgroup[2]
        if tgn > 1024:
            raise ValueError(
                f"Thread group size ({tgn}) is greater than  the maximum allowed threads per threadgroup (1024)."
            )
        if L.tg_used > o["max_threadgroup_memory"]:
            raise ValueError(f"threadgroup memory {L.tg_used} exceeds {o['max_threadgroup_memory']} bytes")
        # buffers in signature order
        infos = cg.shape_infos(self.input_names, self.source)
        keep, bufs, names = [], [], []
        for decl, kind, i in cg.params(args, infos):
            a = arrs[i][0]
            if kind == "data":
                b = np.ascontiguousarray(a).reshape(-1) if a.size else np.zeros(1, a.dtype)
            elif kind == "shape":
                b = np.array(a.shape, np.int32)
            elif kind == "strides":
                st = [1] * a.ndim
                for k in range(a.ndim - 2, -1, -1):
                    st[k] = st[k + 1] * a.shape[k + 1]
                b = np.array(st, np.int64)
            else:
                b = np.array([a.ndim], np.int32)
            keep.append(b)
            bufs.append((b, 0, 0, o["misalign"] * b.itemsize if kind == "data" and args[i].ndim else 0))
            names.append(decl.rsplit(" ", 1)[1])
        outs = []
        for n, s, d in zip(self.output_names, output_shapes, od, strict=False):
            a = np.empty(tuple(s), NP.get(d, d if d != "bool" else np.bool_))
            if init_value is not None:
                if d == "bfloat16":
                    a[...] = np.uint16(np.array(init_value, np.float32).view(np.uint32) >> 16)
                else:
                    a[...] = init_value
            outs.append(a)
            bufs.append((a.reshape(-1), 1, int(init_value is not None), 0))
            names.append(n)
        bd = (BufDesc * len(bufs))(*[BufDesc(b.ctypes.data, b.nbytes, k, ini, off, 0) for b, k, ini, off in bufs])
        reps = (CReport * 64)()
        unw = (ctypes.c_uint64 * len(bufs))()
        tgv = (ctypes.c_uint64 * max(1, 2 * len(L.tgv)))(*[v for p in L.tgv for v in p])
        r = RunArgs(
            L.entry,
            len(bufs),
            bd,
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threadgroup),
            int(o["check"]),
            int(o["strict"]),
            {"forward": 0, "reverse": 1, "random": 2}[o["order"]],
            o["seed"],
            L.tg_lo,
            L.tg_bytes,
            len(L.tgv),
            tgv,
            reps,
            64,
            0,
            0,
            0,
            0,
            0,
            unw,
            L.base,
            L.end,
            int(o["ftz"]),
            0,
        )
        build.runtime().msl_run(ctypes.byref(r))
        self.stats = dict(
            switches=r.stat_switches,
            collectives=r.stat_collectives,
            barriers=r.stat_barriers,
            accesses=r.stat_accesses,
            threadgroup_bytes=L.tg_used,
        )
        rl = self._reports(L, reps[: r.nreports], names, threadgroup)
        if o["check"]:
            for i, (b, k, _ini, _) in enumerate(bufs):
                if k == 1 and unw[i] and o["unwritten"]:
                    rl.append(
                        Report("unwritten-output", f"{names[i]}: {unw[i]} of {b.nbytes} bytes were never written")
                    )
        res = [_back(a, d, like_mx) for a, d in zip(outs, od, strict=False)]
        self.last_reports = rl
        if rl and o["raise_errors"]:
            raise KernelError(self.name, rl, res)
        return res

    def _reports(self, L, reps, names, tg):
        lines = _symbolize(L.path, [p for r in reps for p in (r.pc, r.pc2) if p])
        out = []
        for r in reps:
            buf = names[r.buf] if 0 <= r.buf < len(names) else (L.tgn[r.buf - 1000] if r.buf >= 1000 else "")
            where = lines.get(r.pc) or (f"{self.name}.metal:{r.line}:{r.col}" if r.line else "")
            t = f"{where}: {r.msg.decode()}"
            if buf:
                t += f" `{buf}` byte offset {r.off}"
            t += f" (threadgroup {r.tg}, thread {r.thread}, simdgroup {r.thread // 32} lane {r.thread % 32}"
            if r.kind in (2, 4, 8) and (r.pc2 or r.line2):
                t += f"; other: thread {r.other} at {lines.get(r.pc2) or f'line {r.line2}:{r.col2}'}"
            out.append(Report(KINDS.get(r.kind, r.kind), t + ")"))
        return out


def _symbolize(path, pcs):
    tool = shutil.which("llvm-symbolizer-19") or shutil.which("llvm-symbolizer") or shutil.which("addr2line")
    if not pcs or not tool:
        return {}
    out = {}
    if "addr2line" in tool:
        r = subprocess.run([tool, "-e", path] + [hex(p - 1) for p in pcs], capture_output=True, text=True).stdout.split(
            "\n"
        )
        for p, l in zip(pcs, r, strict=False):
            out[p] = l.split("/")[-1].split(" ")[0]
    else:
        r = subprocess.run(
            [tool, "--obj=" + path, "--output-style=GNU", "--functions=none", "--inlines"] + [hex(p - 1) for p in pcs],
            capture_output=True,
            text=True,
        ).stdout
        # with --inlines several lines per address; query one at a time for certainty
        for p in set(pcs):
            ls = [
                x.split("/")[-1]
                for x in subprocess.run(
                    [tool, "--obj=" + path, "--output-style=GNU", "--functions=none", "--inlines", hex(p - 1)],
                    capture_output=True,
                    text=True,
                ).stdout.split("\n")
                if x
            ]
            u = [x for x in ls if ".metal:" in x or ".header:" in x]
            out[p] = (u or ls or [""])[0]
    return out


defaults = dict(
    check=False,
    strict=True,
    order="forward",
    seed=1,
    typecheck=True,
    raise_errors=True,
    mx=None,
    max_threadgroup_memory=32768,
    misalign=0,
    unwritten=True,
    ftz=False,
)


def metal_kernel(
    name,
    input_names,
    output_names,
    source,
    header="",
    ensure_row_contiguous=True,
    atomic_outputs=False,
    compile_options=None,
    **emu,
):
    return _Kernel(
        name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs, compile_options, **emu
    )


def typecheck(calls):
    return [kernel.typecheck(**call) for kernel, call in calls]


def prebuild(calls, check=True, jobs=2):
    from concurrent.futures import ThreadPoolExecutor

    def one(item):
        kernel, call = item
        instance = kernel._instance(**call)
        lint.check(kernel, instance)
        build.compile_run(cg.run_source(*instance)[0], "check" if check else "fast", math_mode=kernel.math_mode)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, calls))
