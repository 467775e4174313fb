"""AMX's instructions carried out in Python on a processor without them, as Intel's manual describes them.

Such a processor raises SIGILL at each of them. The handler reads the instruction's bytes and the registers, does its
work on tiles that it keeps, and lets the program go on behind it. So the compiled kernels run byte by byte as on a
processor with AMX, only slower. Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections import Counter
from typing import Any

import numpy as np

HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
SA_SIGINFO, SA_NODEFER = 4, 0x40000000
REGISTERS = 40  # offset of the general registers in a ucontext_t of x86-64 Linux
PLACES = [
    13,
    14,
    12,
    11,
    15,
    10,
    9,
    8,
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
]  # there, of rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 ..
RIP = 16
NAMES = {  # opcode and mandatory prefix
    (0x4B, 3): "tileloadd",
    (0x4B, 2): "tilestored",
    (0x5C, 2): "tdpbf16ps",
    (0x49, 3): "tilezero",
    (0x49, 0): "ldtilecfg",
}


class Action(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class State(threading.local):
    """The tile registers of a thread; None before they are configured."""

    def __init__(self) -> None:
        self.tiles: Any = None  # uint8 [8, 16, 64]


class Instruction:
    """One instruction with a three-byte VEX prefix, at an address."""

    def __init__(self, address: int, registers: Any) -> None:
        code = ctypes.string_at(address, 16)
        assert code[0] == 0xC4, f"no AMX instruction: {code.hex()}"
        assert code[1] & 0x1F == 2, code.hex()
        self.third = ~code[2] >> 3 & 15
        self.name = NAMES[code[3], code[2] & 3]
        mode, self.first, low = code[4] >> 6, code[4] >> 3 & 7, code[4] & 7
        self.second, length = low, 5
        self.start = self.stride = 0
        if mode != 3:
            base = low | (~code[1] & 0x20) >> 2
            if low == 4:  # a byte of scale, index and base
                scale, index, low = code[5] >> 6, code[5] >> 3 & 7 | (~code[1] & 0x40) >> 3, code[5] & 7
                base, length = low | (~code[1] & 0x20) >> 2, 6
                self.stride = 0 if index == 4 else registers[PLACES[index]] << scale
            assert not (mode == 0 and low == 5), "an address without a base"
            size = (0, 1, 4)[mode]
            shift = int.from_bytes(code[length : length + size], "little", signed=True)
            self.start, length = registers[PLACES[base]] + shift, length + size
        elif self.name == "ldtilecfg":
            self.name = "tilerelease"
        self.end = address + length

    def rows(self) -> list[int]:
        """Addresses of a tile's rows in memory."""
        return [(self.start + number * self.stride) % 2**64 for number in range(16)]


def carry_out(instruction: Instruction, state: State) -> None:
    """Do the work of an instruction."""
    name = instruction.name
    if name == "ldtilecfg":
        setting = ctypes.string_at(instruction.start, 64)
        assert setting == bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]), "not all tiles whole"
        state.tiles = np.zeros((8, 16, 64), np.uint8)
        return
    assert state.tiles is not None, "tiles are used before they are configured"
    if name == "tilerelease":
        state.tiles = None
    elif name == "tilezero":
        state.tiles[instruction.first] = 0
    elif name == "tileloadd":
        for row, address in zip(state.tiles[instruction.first], instruction.rows(), strict=True):
            row[:] = np.frombuffer(ctypes.string_at(address, 64), np.uint8)
    elif name == "tilestored":
        for row, address in zip(state.tiles[instruction.first], instruction.rows(), strict=True):
            ctypes.memmove(address, row.tobytes(), 64)
    else:
        left, right = (widened(state.tiles[number]) for number in (instruction.second, instruction.third))
        pairs = np.einsum("mkp,knp->mn", left, right)
        sums = state.tiles[instruction.first].view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # rows that pad a tile hold anything
            sums += pairs.astype(np.float32)


def widened(tile: Any) -> Any:
    """The bfloat16 of a tile as float64 [16, 16, 2]."""
    return (tile.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(16, 16, 2)


def emulate() -> Counter[str]:
    """Carry out all instructions of AMX from now on in this process; counts them by name."""
    state, done = State(), Counter[str]()

    def on_signal(_number: int, _information: int, context: int) -> None:
        registers = (ctypes.c_uint64 * 23).from_address(context + REGISTERS)
        instruction = Instruction(registers[RIP], registers)
        carry_out(instruction, state)
        done[instruction.name] += 1
        registers[RIP] = instruction.end

    handler = HANDLER(on_signal)
    action = Action(ctypes.cast(handler, ctypes.c_void_p).value, flags=SA_SIGINFO | SA_NODEFER)
    assert ctypes.CDLL(None).sigaction(int(signal.SIGILL), ctypes.byref(action), None) == 0
    done.handler = handler  # type: ignore[attr-defined]  # lives as long as the counts
    return done
