"""ARM without hardware: instructions of every kernel for a multiply-accumulate, and cycles of its inner loop.

    python benchmarks/arm_instructions.py [--build build/aarch64] [--output docs/benchmarks]

Needs g++-aarch64-linux-gnu, qemu-user-static and llvm-19. Instructions are counted exactly: qemu-user
executes one product (16 tokens x 32 rows, K = 512) instruction by instruction and logs each; what two calls
need more than one is the product's, its write-back included. So it is with rows of 2048 floats or codes.
Cycles are an estimate: llvm-mca's model of a CPU runs the hottest loop as if every load hit the first cache.
LLVM describes the A72 by its model of the A57, and the X2 by that of the Neoverse N2; the Neoverse N1 stands
for the A76, whose server version it is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from peer_report import markdown

ROOT = Path(__file__).parent.parent
MACS, ELEMENTS = 16 * 32 * 512, 2048
PLAIN = ("plain_smlal", "plain_sdot")
CPUS = {"A53": "cortex-a53", "A72": "cortex-a72", "N1": "neoverse-n1", "X2": "cortex-x2"}
MCA = "llvm-mca-19"
NEEDS = {"dotprod": ("N1", "X2"), "sdot": ("N1", "X2"), "i8mm": ("X2",)}
"""CPUs that have the instructions of a kernel whose name ends so; else all."""
PRODUCTS = re.compile(r"^(s|u)?(mull2?|mlal2?|dot|mmla)$|^us(dot|mmla)$|^ml[as]$|^mul$")
LANES = {"sdot": 16, "udot": 16, "usdot": 16, "smmla": 32, "ummla": 32, "usmmla": 32}


def build(folder: Path) -> Path:
    """The program that runs one product."""
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'native/cmake/aarch64.cmake'}"
    static = "-DCMAKE_EXE_LINKER_FLAGS=-static"
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, toolchain, static], check=True)
    command = ["cmake", "--build", folder, "--target", "count_kernel", "-j", "2"]
    subprocess.run(command, check=True)
    return folder / "count_kernel"


def executed(program: Path, kernel: str, calls: int) -> Counter[int]:
    """How often each address was executed, from qemu's log of blocks of one instruction each."""
    with tempfile.NamedTemporaryFile() as log:
        step = ["qemu-aarch64-static", "-cpu", "max", "-singlestep", "-d", "exec,nochain"]
        subprocess.run([*step, "-D", log.name, program, kernel, str(calls)], check=True)
        with Path(log.name).open() as lines:
            return Counter(int(line.split("/")[1], 16) for line in lines if line[:5] == "Trace")


def instructions(program: Path, name: str) -> Counter[int]:
    """How often one call of a kernel or a row executes each address."""
    counts = executed(program, name, 2)
    counts.subtract(executed(program, name, 1))
    return counts


def names(program: Path, kind: str) -> list[str]:
    """The names of the program's kernels ("list") or of its rows ("rows")."""
    return subprocess.check_output(["qemu-aarch64-static", program, kind], text=True).split()


def disassembly(program: Path) -> dict[int, str]:
    """The text of the instruction at each address."""
    out = subprocess.check_output(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", program], text=True
    )
    lines = (re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in out.splitlines())
    return {int(line[1], 16): line[2].strip() for line in lines if line}


def hot_loop(counts: Counter[int], code: dict[int, str]) -> list[str]:
    """The loop that does most multiplications: consecutive instructions, executed equally often."""
    best: list[str] = []
    most = 0
    for jump in counts:
        target = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+([0-9a-f]+)", code[jump])
        if target is None or int(target[1], 16) >= jump:
            continue
        body = [code[at] for at in range(int(target[1], 16), jump + 4, 4)]
        inner = any(re.match(r"b\.|cbn?z|tbn?z|bl|ret", line) for line in body[:-1])
        work = counts[jump] * sum(map(macs_of, body))
        if not inner and work > most:
            best, most = body, work
    return best


def macs_of(text: str) -> int:
    """Multiply-accumulates of one instruction."""
    name, _, operands = text.partition("\t")
    if name in LANES:
        return LANES[name]
    if not PRODUCTS.match(name):
        return 0
    lanes = re.findall(r"v\d+\.(\d+)[bhsd]", operands)
    return min(int(count) for count in lanes) if lanes else 0


def cycles(loop: list[str], cpu: str) -> float:
    """Cycles of one turn, by llvm-mca."""
    *body, jump = (re.sub(r"<.*>|//.*", "", line).strip() for line in loop)
    jump = re.sub(r"[0-9a-f]+$", "loop", jump)
    text = "loop:\n" + "\n".join([*body, jump]) + "\n"
    attributes = "-mattr=+dotprod,+i8mm,+v8.2a"
    out = subprocess.check_output(
        [MCA, "-mtriple=aarch64", f"-mcpu={cpu}", attributes, "-iterations=200"],
        input=text,
        text=True,
    )
    total = re.search(r"Total Cycles:\s+(\d+)", out)
    assert total is not None
    return int(total[1]) / 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, default=Path("build/aarch64"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    program = build(arguments.build.resolve())
    code = disassembly(program)
    kernels = [name for name in names(program, "list") if "reference" not in name]
    rows = []
    for kernel in (*PLAIN, *kernels):
        counts = instructions(program, kernel)
        count = counts.total()
        loop = hot_loop(counts, code)
        turn = sum(map(macs_of, loop))
        row = {"kernel": kernel, "instructions_per_mac": count / MACS, "loop": len(loop)}
        row["loop_macs"] = turn
        for label, cpu in CPUS.items():
            if turn and label in NEEDS.get(kernel.rpartition("_")[2], CPUS):
                row[label] = turn / cycles(loop, cpu)
        rows.append(row)
        print(row, flush=True)
    floats = {
        name: instructions(program, name).total() / ELEMENTS for name in names(program, "rows")
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = {"kernels": rows, "rows": floats}
    (arguments.output / "arm.json").write_text(json.dumps(found, indent=1) + "\n")
    headings = ["kernel", "instructions / MAC", *(f"{c}, MAC/cycle" for c in CPUS)]
    cells = [
        [row["kernel"], f"{row['instructions_per_mac']:.4f}"]
        + [f"{row[c]:.1f}" if c in row else "-" for c in CPUS]
        for row in rows
    ]
    of_rows = [[name, f"{count:.2f}"] for name, count in floats.items()]
    tables = (markdown(headings, cells), markdown(["row", "instructions / element"], of_rows))
    (arguments.output / "arm.md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
