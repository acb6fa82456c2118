"""Runs the tables of the HC-SMoE and M-SMoE papers on a machine that has the weights, and prints both figures.

Run: python benchmarks/paper_tables.py [--table NAME ...] [--rows TEXT ...] [--model NAME=REPO_OR_FOLDER ...]
         [--output DIR] [--limit N] [--samples N] [--remove-weights] [--json FILE] [--list | --dry-run]
     python benchmarks/paper_tables.py --small [--table NAME ...] [--samples N] [--json FILE]
     python benchmarks/paper_tables.py --page FILE

Rows are converted and evaluated by the commands that ``--list`` prints, each in a process of its own. What is done
already in ``--output`` is not done again, so the same command goes on after an interruption. ``--limit`` and
``--samples`` are for a trial: fewer questions of each task, fewer calibration sequences than the papers' 32.
``--dry-run`` shows the plan of each conversion, with its memory and arithmetic. ``--small`` runs the same methods on
the example model with text from this repository, without a network. ``--page`` writes tables and commands into the
documentation.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paper_small
from paper_commands import Commands
from paper_data import Conversion, Data, Row, Table, load
from paper_report import command, compared, filled, published
from paper_runs import Accuracy, Runner, Runs, accuracies, here, in_a_process, missing_text

from hcsmoe_hub.machine.versions import installed_versions

SMALL_SAMPLES = 16


def chosen(data: Data, names: list[str] | None, words: list[str] | None) -> tuple[Table, ...]:
    """The tables, and of their rows those whose method or number of experts is named; the sources always."""
    tables = [table for table in data.tables if names is None or table.name in names]
    if words is None:
        return tuple(tables)
    kept = []
    for table in tables:
        rows = tuple(row for row in table.rows if row.recipe is None or _is_named(row, words))
        kept.append(replace(table, rows=rows))
    return tuple(kept)


def _is_named(row: Row, words: list[str]) -> bool:
    return any(word in (row.recipe, str(row.experts)) or word.lower() in row.method.lower() for word in words)


def listed(data: Data, tables: tuple[Table, ...], commands: Commands) -> Iterator[str]:
    """Every table as published, and the commands of its rows."""
    for table in tables:
        paper = data.papers[table.paper]
        yield f"## {table.name}: {table.title} (arXiv {paper['arxiv']}, Table {table.number})\n"
        yield f"{published(data, table)}\n"
        for row in table.rows:
            conversion = table.conversion(row)
            if row.recipe is not None:
                yield command(commands.convert(conversion))
            yield command(commands.evaluate(conversion, table.tasks))
        yield ""


def planned(data: Data, tables: tuple[Table, ...], runs: Runs, run: Runner) -> None:
    """Shows the plan of every conversion that is not made yet."""
    for conversion in dict.fromkeys(conversion for _, _, conversion in data.conversions(tables)):
        if conversion.recipe is None or runs.is_converted(conversion) or _lacks_text(runs.commands, conversion):
            continue
        words = [*runs.commands.convert(conversion), "--dry-run"]
        print(command(words), flush=True)
        run(words)


def measured(data: Data, table: Table, runs: Runs) -> dict[Row, tuple[list[Accuracy], float | None]]:
    """Makes and measures the rows of a table."""
    found = {}
    for row in table.rows:
        conversion = table.conversion(row)
        if _lacks_text(runs.commands, conversion):
            continue
        measures = runs.measured(conversion, table.tasks)
        report = {} if row.recipe is None else runs.report(conversion)
        ratio = report["measured"]["overall"]["ratio"] if report.get("measured") else None
        found[row] = accuracies(measures, data.tasks[table.tasks]), ratio
    return found


def _lacks_text(commands: Commands, conversion: Conversion) -> bool:
    file = missing_text(commands, conversion)
    if file is not None:
        print(f"{conversion.name} is left out: there is no {file} to calibrate on.", flush=True)
    return file is not None


def run_table(data: Data, table: Table, runs: Runs) -> dict[str, Any]:
    """Runs a table and prints it.

    Returns:
        For each conversion ``measured`` (value and error by task, and of the average), ``published`` (by task) and
        ``perplexity_ratio``.
    """
    rows = measured(data, table, runs)
    print(f"## {table.name}: {table.title}\n\n{compared(data, table, rows)}\n", flush=True)
    tasks = [*data.tasks[table.tasks], "average"]
    return {
        table.conversion(row).name: {
            "measured": {task: each._asdict() for task, each in zip(tasks, values, strict=True)},
            "published": dict(zip(tasks, [*row.published, row.average], strict=True)),
            "perplexity_ratio": ratio,
        }
        for row, (values, ratio) in rows.items()
    }


def run_small_table(data: Data, table: Table, runs: Runs) -> dict[str, Any]:
    """The same on the example model: for each conversion its perplexity, and its accuracy with the standard error."""
    found = {}
    for conversion in map(table.conversion, table.rows):
        found[conversion.name] = paper_small.figures(runs.measured(conversion, table.tasks))
    print(f"## {table.name}: {table.title}\n\n{paper_small.small_table(table, found)}\n", flush=True)
    return found


def parse(arguments: list[str] | None, data: Data) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = [table.name for table in data.tables]
    parser.add_argument("--table", nargs="+", choices=names, help="tables to run; all by default")
    parser.add_argument("--rows", nargs="+", help="rows to run, by parts of the method's name or by number of experts")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=PLACE", help="folder or repository of a model")
    parser.add_argument("--output", type=Path, default=Path("paper-tables"), help="folder of the results")
    parser.add_argument("--limit", type=int, help="questions of each task; all by default")
    parser.add_argument("--samples", type=int, help="calibration sequences; by default those of the papers")
    parser.add_argument("--remove-weights", action="store_true", help="remove the weights of a result once measured")
    parser.add_argument("--json", type=Path, help="where the figures are kept")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print tables and commands, and run nothing")
    mode.add_argument("--dry-run", action="store_true", help="show the plan of each conversion")
    mode.add_argument("--small", action="store_true", help="run the same methods on the example model")
    mode.add_argument("--page", type=Path, help="page of the documentation to write tables and commands into")
    wanted = parser.parse_args(arguments)
    by_name = {key: name for name, model in data.models.items() for key in (name, model["repository"])}
    wanted.sources = {}
    for name, is_given, place in (each.partition("=") for each in wanted.model):
        if not is_given or name not in by_name:
            parser.error(f"--model takes NAME=PLACE, where NAME is one of {', '.join(by_name)}")
        wanted.sources[by_name[name]] = place
    return wanted


def main(arguments: list[str] | None = None) -> None:
    data = load()
    wanted = parse(arguments, data)
    if wanted.page is not None:
        wanted.page.write_text(filled(wanted.page.read_text("utf-8"), data), "utf-8")
        return
    data = paper_small.scaled(data) if wanted.small else data
    tables = chosen(data, wanted.table, wanted.rows)
    if wanted.small:
        commands = paper_small.commands(data, wanted.output, wanted.samples or SMALL_SAMPLES)
    else:
        commands = Commands(
            data=data, sources=wanted.sources, folder=wanted.output, samples=wanted.samples, limit=wanted.limit
        )
    run = here if wanted.small else in_a_process
    runs = Runs(commands, run, removes=wanted.remove_weights)
    if wanted.list:
        print("\n".join(listed(data, tables, commands)))
        return
    wanted.output.mkdir(parents=True, exist_ok=True)
    if wanted.dry_run:
        planned(data, tables, runs, run)
        return
    found: dict[str, Any] = {}
    for table in tables:
        found[table.name] = (run_small_table if wanted.small else run_table)(data, table, runs)
        if wanted.json is not None:
            settings = {"limit": wanted.limit, "samples": commands.samples, "versions": installed_versions()}
            wanted.json.write_text(json.dumps({"settings": settings, "tables": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
