"""Type-checks instantiations with clang's C++ for OpenCL, whose address spaces are Metal's, and with further rules."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from . import cache as disk
from .build import toolchain_key, use_precompiled
from .compiler import TYPECHECK, clang, include_flags
from .errors import CompileError
from .instance import Instance
from .rules import syntax_tree_findings, token_findings
from .sources import check_source

# Instantiations of one header checked by one clang: parsing the header is shared, an error costs checking each again.
GROUP = 8
MAX_NOTES = 3
_FATAL_WARNINGS = ("-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized", "-Wreturn-type")
_NUMBERED = re.compile(r"(\w+)@(\d+)\.(metal|arguments)")


class _Findings:
    """Errors and warnings of one instantiation, as ``name.metal:line:column: error: ...``."""

    def __init__(self, errors=(), warnings=()):
        self.errors, self.warnings = list(errors), list(warnings)

    def add(self, line: str) -> None:
        line = _NUMBERED.sub(r"\1.\3", line)
        fatal = "error:" in line or any(flag in line for flag in _FATAL_WARNINGS)
        where = self.errors if fatal else self.warnings
        if line not in where:
            where.append(line)


def _clang_lines(text: str, name: str) -> list[str]:
    """Errors, each with its first notes, and those warnings that are about the kernel's own text."""
    own = re.compile(rf"{re.escape(name)}(@\d+)?\.(metal|header):")
    found, notes = [], MAX_NOTES
    for line in text.splitlines():
        if re.search(r": (fatal )?error:", line) or (": warning:" in line and own.match(line)):
            found.append(line)
            notes = 0 if "error:" in line else MAX_NOTES
        elif ": note:" in line and notes < MAX_NOTES:
            found[-1] += f"\n    {line}"
            notes += 1
        elif ": warning:" in line:
            notes = MAX_NOTES
    return found


def _check_group(group: list[Instance]) -> list[_Findings]:
    """Check instantiations that share name and header in one clang; each alone if an error may be of any of them."""

    def make(path: Path) -> None:
        text = path.with_suffix(".clcpp")
        try:
            text.write_text(check_source(group))
            flags = [*TYPECHECK, *include_flags(), *use_precompiled(TYPECHECK), "-fsyntax-only"]
            done = clang(*flags, "-Xclang", "-ast-dump", text)
        finally:
            text.unlink(missing_ok=True)
        lines = _clang_lines(done.stderr.replace(str(text), "<generated>"), group[0].name)
        if done.returncode == 0:
            lines += syntax_tree_findings(done.stdout)
        elif not lines:
            lines = [f"{group[0].name}.metal:1:1: error: {done.stderr}"]
        path.write_text(json.dumps(lines))

    key = disk.key(toolchain_key(), TYPECHECK, _RULES, *group)
    lines = json.loads(disk.get(f"typecheck_{key}.json", make).read_text())
    if len(group) > 1 and any("error:" in line for line in lines):
        return [findings for instance in group for findings in _check_group([instance])]
    out = []
    for number, instance in enumerate(group):
        tokens = token_findings(instance.name, "header", instance.header)
        findings = _Findings([*tokens, *token_findings(instance.name, "metal", instance.source)])
        for line in lines:
            found = _NUMBERED.search(line)
            if found is None or int(found[2]) == number:
                findings.add(line)
        out.append(findings)
    return out


# The rules are part of what a stored result depends on.
_RULES = (Path(__file__).parent / "rules.py").read_bytes() + Path(__file__).read_bytes()


@cache
def _check_alone(instance: Instance) -> _Findings:
    return _check_group([instance])[0]


def check(instances: list[Instance], jobs: int = 2) -> list[list[str]]:
    """The warnings of each instantiation, checked by ``jobs`` processes. Raises ``CompileError`` with all errors."""
    found = [_check_alone(instances[0])] if len(instances) == 1 else _check_many(instances, jobs)
    failed = [(i, f.errors) for i, f in zip(instances, found, strict=True) if f.errors]
    if failed:
        # Instantiations of one template fail alike; what differs between them stands in the lines.
        lines = dict.fromkeys(line for _, errors in failed for line in errors)
        name = failed[0][0].name
        raise CompileError(f"[{name}] wanted valid Metal, got {len(lines)} error(s):\n" + "\n".join(lines))
    return [f.warnings for f in found]


def _check_many(instances: list[Instance], jobs: int) -> list[_Findings]:
    shared: dict[tuple[str, str], list[Instance]] = {}
    for instance in dict.fromkeys(instances):
        shared.setdefault((instance.name, instance.header), []).append(instance)
    groups = [members[i : i + GROUP] for members in shared.values() for i in range(0, len(members), GROUP)]
    use_precompiled(TYPECHECK)  # before two processes want it
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(_check_group, groups))
    found = {i: f for group, result in zip(groups, results, strict=True) for i, f in zip(group, result, strict=True)}
    return [found[instance] for instance in instances]
