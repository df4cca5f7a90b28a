"""One species of alignments (.maf or .maf.gz) as FASTA, a record for each block, for `data.name=bases`.

    apt-get download maffilter-examples && dpkg-deb --extract maffilter-examples_*.deb maf
    python benchmarks/maf_to_fasta.py --species=Hsap data/human22.fa $(find maf -name '*chr22*.maf.gz')

Gaps are left out. Blocks keep their order, so a split by place holds whole blocks out; orthologues of other species
must be split in the same way. Without --species it lists those that there are.
"""

import argparse
import gzip
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Source, such as Hsap.22, and bases without gaps, of each line of sequence."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            if line.startswith("s"):
                _, source, _, _, _, _, bases = line.split()
                yield source, bases.replace("-", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--species")
    options = parser.parse_args()
    found: Counter[str] = Counter()
    chosen = []
    for path in sorted(options.files):
        for source, bases in blocks(path):
            species = source.partition(".")[0]
            found[species] += len(bases)
            if species == options.species:
                chosen.append(f">{source} {len(chosen)}\n{bases}\n")
    if not chosen:
        sys.exit(f"--species={options.species}: there are {', '.join(f'{s} ({n:,} bases)' for s, n in found.items())}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(chosen))
    print(f"{found[options.species]:,} bases in {len(chosen):,} blocks: {options.out}")


if __name__ == "__main__":
    main()
