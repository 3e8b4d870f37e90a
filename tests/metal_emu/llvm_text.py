"""One function of LLVM's text: its blocks, its loops, and what its pointers point into."""

from __future__ import annotations

import re
from collections import Counter


class Function:
    """A kernel's function, read from the text of a module that names its values.

    Attributes:
        blocks: label -> lines.
        defined: value -> the text behind its ` = `.
        uses: how often a value's name occurs, its definition included.
        next, previous: label -> labels of the blocks that follow, and that lead to it.
        dominators: label -> the blocks that lie on every way to it, itself included.
    """

    def __init__(self, module: str, name: str):
        start = re.search(rf"^define [^\n]*@_Z\d+{re.escape(name)}[^\n]*\{{$", module, re.M)
        body = module[start.end() : module.index("\n}", start.end())]
        self.parameters = set(re.findall(r"%([\w.]+)", start[0]))
        self.threadgroup = set(re.findall(r'^@(\S+) = [^\n]*section "emu_threadgroup"', module, re.M))
        self.blocks: dict[str, list[str]] = {"": []}
        label = ""
        for line in body.splitlines():
            if found := re.match(r"([\w.$-]+):", line):
                label = found[1]
                self.blocks[label] = []
            elif line.strip():
                self.blocks[label].append(line.strip())
        if not self.blocks[""]:
            del self.blocks[""]
        self.defined = {
            line.split(" = ", 1)[0][1:]: line.split(" = ", 1)[1]
            for lines in self.blocks.values()
            for line in lines
            if re.match(r"%[\w.]+ = ", line)
        }
        self.uses = Counter(re.findall(r"%([\w.]+)", body))
        self.next = {label: re.findall(r"label %([\w.$-]+)", " ".join(lines)) for label, lines in self.blocks.items()}
        self._dominators()

    def _dominators(self) -> None:
        first = next(iter(self.blocks))
        self.previous: dict[str, list[str]] = {label: [] for label in self.blocks}
        for label, targets in self.next.items():
            for target in targets:
                self.previous[target].append(label)
        everything = set(self.blocks)
        self.dominators = {label: {first} if label == first else everything for label in self.blocks}
        changed = True
        while changed:
            changed = False
            for label in self.blocks:
                if label != first:
                    new = {label} | set.intersection(*(self.dominators[p] for p in self.previous[label]))
                    changed |= new != self.dominators[label]
                    self.dominators[label] = new

    def loops(self) -> dict[str, set[str]]:
        """Header -> the blocks of its natural loop."""
        out: dict[str, set[str]] = {}
        for label, targets in self.next.items():
            for header in set(targets) & self.dominators[label]:
                body, wanted = out.setdefault(header, {header}), [label]
                while wanted:
                    if (block := wanted.pop()) not in body:
                        body.add(block)
                        wanted += self.previous[block]
        return out

    def read_by(self, block: str) -> set[str]:
        """The inputs that a block loads from."""
        pointers = [re.search(r"ptr (\S+?),", line)[1] for line in self.blocks[block] if " = load " in line]
        return {base for pointer in pointers for base in self.base_of(pointer).split("/")} & self.parameters

    def base_of(self, pointer: str, seen: frozenset = frozenset()) -> str:
        """What a pointer points into: an input's name, "threadgroup", "constant" or "private"."""
        if pointer.startswith("@"):
            return "threadgroup" if pointer[1:] in self.threadgroup else "constant"
        name = pointer[1:]
        if name in self.parameters:
            return name
        line = self.defined[name]
        if line.startswith("alloca"):
            return "private"
        if line.startswith("getelementptr"):
            sources = re.findall(r"ptr ([%@][\w.]+)", line)[:1]
        elif line.startswith("phi"):
            sources = [s for s in re.findall(r"\[ ([%@][\w.]+),", line) if s not in seen and s != pointer]
        elif line.startswith("select"):
            sources = re.findall(r"ptr ([%@][\w.]+)", line)
        else:
            raise ValueError(f"[count_loop] wanted a pointer made of inputs or variables, got %{name} = {line}.")
        bases = {self.base_of(source, seen | {pointer}) for source in sources}
        return "/".join(sorted(bases))
