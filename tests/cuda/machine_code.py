"""What ptxas made of the kernels in an object file or library: instructions, registers, stack, by kernel and
architecture."""

import collections
import dataclasses
import pathlib
import re
import struct
import subprocess
import tempfile

import tools

FATBIN = struct.pack("<I", 0xBA55ED50)


@dataclasses.dataclass
class Code:
    instructions: collections.Counter  # by name, such as HMMA
    listing: list  # names with modifiers, such as LDG.E.CONSTANT, and labels, in their order
    registers: int
    stack: int


def fat_binaries(path):
    """The fat binaries in a file, one for each compiled kernel of the library."""
    data, at = pathlib.Path(path).read_bytes(), 0
    while (at := data.find(FATBIN, at)) >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        yield data[at : at + header + size]
        at += header + size


def codes(binary):
    """{architecture: {kernel: Code}} of a fat binary."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernels.fatbin")
        file.write_bytes(binary)

        def run(tool, *args):
            done = subprocess.run([tools.find(tool), *args], cwd=folder, check=True, capture_output=True, text=True)
            return done.stdout + done.stderr

        run("cuobjdump", "-xelf", "all", file.name)
        for cubin in pathlib.Path(folder).glob("*.cubin"):
            kernels = {}
            usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", run("cuobjdump", "-res-usage", cubin.name))
            for section in re.split(r"^\s*\.section\s+\.text\.", run("nvdisasm", "-c", cubin.name), flags=re.M)[1:]:
                name = re.match(r"\w+", section).group(0)
                line = r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.a-z_]*)|(\.L_\w+):)"
                listing = [instruction or label for instruction, label in re.findall(line, section, re.M)]
                names = collections.Counter(i.split(".")[0] for i in listing if i[0] != ".")
                registers, stack = next((int(r), int(s)) for n, r, s in usage if n == name)
                kernels[name] = Code(names, listing, registers, stack)
            result[re.search(r"sm_(\d+)", cubin.name).group(1)] = kernels
    return result


def loads_before_a_store(code):
    """How many values of what a kernel reads and writes a thread waits for at a time: the most loads in front of a
    store, in a straight stretch of code. Those of what is only read are CONSTANT, and do not count."""
    most = loads = 0
    for name in code.listing:
        if name.startswith("LDG") and "CONSTANT" not in name:
            loads += 1
        elif name.startswith("STG"):
            most, loads = max(most, loads), 0
        elif name[0] == "." or name.startswith("BRA"):
            loads = 0
    return most
