"""When a modelled cache drops, encodes and takes back: a cache of one sequence, and a batch; see `cache_model`."""

import copy

from cache_model import Sequence

MOST_VERIFIED = 8  # a call of more tokens is never a decode step


class Single:
    """A cache of one sequence: when it drops and encodes, and what a rewind takes back."""

    def __init__(self, shape, sequence=None):
        self.shape, self.sequence = shape, sequence or Sequence(shape)
        self.chunk_ended = self.trimmed = False
        self.drafts = False  # the next call is of drafts that a linked draft model has read
        self.undo = []  # of each encoding inside the last call: offset, raw rows at the end, tokens in blocks

    def is_decode(self, L):
        return self.sequence.held > 0 and not self.chunk_ended and (L == 1 or (self.trimmed and L <= MOST_VERIFIED))

    def update(self, rows):
        """Add tokens; returns, for each of them, the keys and values that its query sees."""
        sequence, L = self.sequence, rows[0].shape[1]
        sequence.newest, self.undo = None, []
        decode = self.drafts or self.is_decode(L)
        sequence.make_room(L if decode else 1)
        prompt_first = self.drafts and self.chunk_ended  # then the first token is the prompt's last
        if (decode or self.shape.scheme.prefill == "compressed") and not prompt_first:
            sequence.encode()
        self.chunk_ended = self.trimmed = False
        if not decode:
            sequence.append(rows)
            return [[side[:, : sequence.held - L + i + 1] for side in sequence.rows] for i in range(L)]
        seen = []
        for i in range(L):
            if i and sequence.due():
                start = sequence.sinks + sequence.packed
                tail = [side[:, start:].copy() for side in sequence.rows]
                self.undo.append((sequence.offset, tail, sequence.packed))
                sequence.encode()
            sequence.append([side[:, i : i + 1] for side in rows])
            seen.append([side.copy() for side in sequence.rows])
        return seen

    def loop_reads_state(self):
        """What mlx-lm's loops do after each chunk of a prompt."""
        self.chunk_ended = True
        self.sequence.count_newest()
        if self.shape.scheme.prefill == "compressed":
            self.compress()

    def compress(self):
        if self.sequence.make_room(1):
            self.undo = []  # it needs tokens that are gone
        return self.sequence.encode()

    def trim(self, n):
        """Forget the newest n tokens; an encoding inside the last call, which they would have preceded, is undone."""
        sequence = self.sequence
        kept, undo, self.undo, self.trimmed = sequence.offset - n, self.undo, [], True
        if kept <= 0:
            sequence.forget()
            self.chunk_ended = self.trimmed = False
            return
        for offset, tail, packed in undo:
            if offset > kept:
                sequence.trim(sequence.offset - offset)
                for side, raw in zip(sequence.rows, tail, strict=True):
                    side[:, side.shape[1] - raw.shape[1] :] = raw
                sequence.packed, sequence.fresh = packed, min(sequence.fresh, packed)
                if not packed:
                    sequence.sinks, sequence.quantizers = 0, None
                break
        sequence.trim(sequence.offset - kept)

    def unread(self, n):
        """Forget the newest n tokens: what comes next is prompt."""
        self.trim(n)
        self.sequence.newest = None
        self.trimmed, self.chunk_ended = False, self.sequence.held > 0

    def restored(self):
        """What comes back from a file: what belongs to the last call alone is not kept."""
        other = copy.deepcopy(self)
        other.undo = []
        return other


class Batch:
    """A cache of several sequences, which share a phase."""

    def __init__(self, shape, sequences, chunk_ended=False):
        self.shape, self.sequences, self.chunk_ended = shape, sequences, chunk_ended
        self.trimmed = self.decoding = False
        self.ahead = self.padding = None

    @classmethod
    def merged(cls, shape, singles):
        """A batch of the sequences of single caches."""
        sequences = [copy.deepcopy(single.sequence) for single in singles]
        return cls(shape, sequences, any(single.chunk_ended for single in singles))

    def is_decode(self, L):
        if self.chunk_ended or self.padding is not None or not any(s.held for s in self.sequences):
            return False
        return L == 1 or (self.trimmed and L <= MOST_VERIFIED)

    def room_for(self, L):
        return L if self.is_decode(L) else 1

    def beyond(self, i):
        """Tokens at the end of a sequence that are padding."""
        return 0 if self.ahead is None else max(-self.ahead[i], 0)

    def update(self, rows):
        """Add L tokens to each: keys and values (B, H, L, D). Returns what each one's queries see, by sequence."""
        L, decode = rows[0].shape[2], self.is_decode(rows[0].shape[2])
        for i, sequence in enumerate(self.sequences):
            sequence.newest = None
            sequence.make_room(self.room_for(L), self.beyond(i))
        if decode or self.shape.scheme.prefill == "compressed":
            self.compress()
        self.decoding = L == 1
        self.chunk_ended = self.trimmed = False
        seen = []
        for i, sequence in enumerate(self.sequences):
            sequence.append([side[i] for side in rows])
            first = sequence.held - L + 1
            seen.append([[side[:, : first + j] for side in sequence.rows] for j in range(L)])
        self.valid = [L] * len(self.sequences)
        if self.ahead is not None:
            self.valid = [min(max(n, 0), L) for n in self.ahead]
            self.ahead = [n - L for n in self.ahead]
        return seen

    def loop_reads_state(self):
        self.chunk_ended, self.decoding = True, False
        for sequence in self.sequences:
            sequence.count_newest()
        if self.shape.scheme.prefill == "compressed":
            self.compress()

    def compress(self):
        for i, sequence in enumerate(self.sequences):
            sequence.make_room(1, self.beyond(i))
        return sum(sequence.encode(self.beyond(i)) for i, sequence in enumerate(self.sequences))

    def prepare(self, lengths, padding):
        self.ahead, self.padding = list(lengths), list(padding)

    def finalize(self):
        """Padding goes."""
        for sequence, count in zip(self.sequences, self.padding or (), strict=False):
            sequence.trim(count) if count < sequence.offset else sequence.keep(slice(0, 0))
        self.ahead = self.padding = None

    def trim(self, n):
        for sequence in self.sequences:
            sequence.trim(n)
        self.trimmed = True

    def extend(self, other):
        if self.decoding and other.decoding:
            self.compress()
            other.compress()
        self.sequences += other.sequences
        self.chunk_ended, self.decoding = self.chunk_ended or other.chunk_ended, self.decoding and other.decoding

    def filter(self, keep):
        self.sequences = [copy.deepcopy(self.sequences[i]) for i in keep]

    def extract(self, i):
        single = Single(self.shape, copy.deepcopy(self.sequences[i]))
        single.chunk_ended = self.chunk_ended and single.sequence.held > 0
        return single
