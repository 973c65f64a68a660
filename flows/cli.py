"""The command line: `likeness`. It parses, shows and exits; what is done is done in the flows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import cli_gate, cli_nights, cli_operating
from flows.terminal import Config, Json, bars, enrolment_of, err, print_json, watching
from likeness.errors import LikenessError, RecipeError
from likeness.intake.sources import open_source
from likeness.settings import load_settings

app = typer.Typer(name="likeness", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
                  help="Photos of a person in, an accepted, auditable, personalised text-to-image model out.")
PhotosArgument = Annotated[str, typer.Argument(help="Photos of one person: a folder, a .zip, or store:PREFIX/ for photos in the store.")]
Attempts = Annotated[int | None, typer.Option("--attempts", help="How many trainings this run may make, the first one counted, 1 to 10: after a refusal with the next "
                                              "recipe of the ladder; instead of `max_attempts`.")]
SubjectOption = Annotated[str, typer.Option("--subject", help="An opaque id: small letters, digits, - and _. Never a name.")]
app.add_typer(cli_nights.subjects)
app.add_typer(cli_gate.gate)
app.command()(cli_nights.nightly)
for command in (cli_operating.deploy, cli_operating.up, cli_operating.status, cli_operating.down, cli_operating.recover, cli_operating.prune):
    app.command()(command)
EXIT = {"accepted": 0, "needs_photos": 2, "retry": 3, "rejected": 3}


@app.command()
def demo(attempts: Attempts = None, as_json: Json = False, config: Config = None) -> None:
    """Personalise the shipped demo subject (12 rendered photos): photos to verdict in about three minutes on two cores."""
    photos = Path(__file__).parents[1] / "examples" / "demo"
    if not photos.is_dir():
        raise RecipeError("the demo photos lie in the repository, under examples/demo: run `make demo` in a checkout")
    _personalize(str(photos), "demo", "man", "rendered: nobody needs to consent", as_json, config, {"max_attempts": attempts})


@app.command()
def run(photos: PhotosArgument, subject: SubjectOption,
        noun: Annotated[str, typer.Option("--class", help="What the subject is: man, woman or person.")] = "person",
        consent: Annotated[str, typer.Option(help="Who allowed this: a reference into your own records.")] = "operator",
        method: Annotated[str | None, typer.Option(help="dreambooth, lora, textual_inversion or pivotal, with the numbers of its preset; instead of "
                                                        "`recipe.method`.")] = None,
        attempts: Attempts = None, as_json: Json = False, config: Config = None) -> None:
    """Photos to verdict, and to a registered model if accepted. Run it again after a crash: published stages are not made twice."""
    _personalize(photos, subject, noun, consent, as_json, config, {"recipe.method": method, "max_attempts": attempts})


def _personalize(photos: str, subject: str, noun: str, consent: str, as_json: bool, config: Path | None, flags: dict[str, Any] | None = None) -> None:
    settings = load_settings(config, flags)
    enrolment = enrolment_of(photos, subject, noun, consent)
    with watching(settings) as tools:
        tools.enrol(enrolment, keep_paused=True)
        from flows.personalize import personalize

        result = personalize(subject)
    if as_json:
        print_json(result)
    else:
        _show_result(result)
    raise typer.Exit(EXIT[result["verdict"]] if result["verdict"] != "accepted" or result["release"] else 3)


@app.command()
def inspect(photos: PhotosArgument, html: Annotated[Path | None, typer.Option(help="Also write a contact sheet: every file with its verdict, as one HTML page.",
                                                                              dir_okay=False)] = None, as_json: Json = False, config: Config = None) -> None:
    """Judge photos without keeping anything: which are used, which are not and why, what the set lacks, how likely acceptance is."""
    from flows.contact_sheet import write_contact_sheet
    from models.faces.photos import inspect_photos
    from tasks.prospects import expect
    from tasks.runtime import Tools

    settings = load_settings(config)
    tools = Tools(settings)
    source = open_source(photos, store=tools.store, policy=settings.intake)
    with bars() as show:
        found = inspect_photos(source, tools=tools.faces, policy=settings.intake, reader=tools.slots, progress=lambda done, total: show("inspect", done, total, ""))
        if found.set.verdict == "ok":
            show("estimate", 0, 1, "what the base can keep of this person")
        estimate, expected = expect(tools, found)
        if found.set.verdict == "ok":
            show("estimate", 1, 1, "")
    if html is not None:
        write_contact_sheet(found, html, expected=expected)
    if as_json:
        print_json({**found.as_json(), "estimate": {**(estimate.plain() if estimate is not None else {"accepted": None}), "message": expected}})
    else:
        table = Table("photo", "verdict", "reason", "what to do")
        for j in found.judgements:
            table.add_row(j.name, j.verdict, j.reason or "", j.message)
        Console().print(table)
        Console().print(f"[bold]{found.set.verdict}[/]: {found.set.message}", *(f"\n  {a}" for a in found.set.advice), f"\n{expected}")
        if html is not None:
            Console().print(f"contact sheet: {html}", soft_wrap=True)
    raise typer.Exit(0 if found.set.verdict == "ok" else 2)


@app.command()
def sample(subject: Annotated[str, typer.Argument(help="A subject with a Release, or a LoRA file or embedding of another program (.safetensors).")],
           prompt: Annotated[str, typer.Argument(help="The prompt; {who} or the subject's id stands for the person, else the person is put first. With a file it is "
                                                 "taken as it is, and {who} is the embedding's word.")],
           embedding: Annotated[Path | None, typer.Option(help="An embedding (.safetensors) that belongs to the LoRA file.", dir_okay=False)] = None,
           count: Annotated[int, typer.Option(min=1, max=64, help="How many pictures.")] = 4, seed: Annotated[int, typer.Option(min=0)] = 0,
           out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path(),
           unsafe: Annotated[bool, typer.Option("--allow-unsafe", help="Write every picture. Else one that is judged unsafe (nudity above all), or cannot be judged, is not "
                                                "written, and said.")] = False, as_json: Json = False, config: Config = None) -> None:
    """Draw a subject with their registered model, or what a file of another program holds. Exits with 2 if no picture could be written."""
    from flows.samples import draw, draw_file, is_file

    if embedding is not None and not is_file(subject):
        raise RecipeError(f"--embedding belongs to a LoRA file, {subject!r} is a subject: name the file in its place, or leave --embedding out")
    with watching(load_settings(config)) as tools:
        drawn = draw_file(tools, Path(subject), prompt, embedding=embedding, count=count, seed=seed, out=out, unsafe=unsafe) if is_file(subject) else \
            draw(tools, subject, prompt, count=count, seed=seed, out=out, unsafe=unsafe)
    if as_json:
        print_json({"subject": subject, "files": [str(f) for f in drawn.files], "withheld": [{"seed": s, "why": why} for s, why in drawn.withheld]})
    else:
        for file in drawn.files:
            typer.echo(file)
        for number, why in drawn.withheld:
            typer.echo(f"the picture of seed {number} was not written: {why}. Choose another --seed, or write it with --allow-unsafe", err=True)
    if not drawn.files:
        raise typer.Exit(2)


@app.command()
def export(subject: Annotated[str, typer.Argument(help="A subject with a Release.")],
           form: Annotated[str, typer.Option("--format", help="diffusers (a LoRA file; of a DreamBooth adapter a whole pipeline), kohya (a LoRA file for kohya's scripts "
                                             "and web UIs), embedding (a Textual Inversion file), vae (a folder: the decoder tuned for the subject, "
                                             "which the other formats leave behind).")] = "diffusers",
           out: Annotated[Path | None, typer.Option(help="The file, or folder, to write; default: SUBJECT-FORMAT.safetensors here.")] = None,
           as_json: Json = False, config: Config = None) -> None:
    """Write a subject's registered adapter for other programs."""
    from flows.exporting import export as write

    with watching(load_settings(config)) as tools:
        written = write(tools, subject, form, out=out)
    if as_json:
        print_json({"subject": subject, "format": form, "file": str(written)})
    else:
        typer.echo(written)


@app.command()
def lineage(subject: Annotated[str, typer.Argument(help="A subject.")], as_json: Json = False, config: Config = None) -> None:
    """Walk from the newest Release back to the photos and verify every digest against the Store."""
    from likeness.lineage import walk
    from tasks.runtime import Tools

    chain = walk(Tools(load_settings(config)).store, subject).as_json()
    if as_json:
        print_json(chain)
    else:
        table = Table("stage", "key", "digest", "verified")
        for link in chain["chain"]:
            table.add_row(link["stage"], link["key"][:12], link["digest"][:12], "yes" if link["verified"] else "[red]NO[/]")
        Console().print(table)
        Console().print(f"{len(chain['photos'])} photos; {'every digest holds' if chain['ok'] else 'A DIGEST DOES NOT HOLD'}")
    raise typer.Exit(0 if chain["ok"] else 1)


@app.command()
def audit(photo: Annotated[str | None, typer.Option(help="sha256 of a photo, as stored or as given.")] = None,
          base: Annotated[str | None, typer.Option(help="Digest of a base, or sha256 of one of its files.")] = None,
          code: Annotated[str | None, typer.Option(help="A code version.")] = None, as_json: Json = False, config: Config = None) -> None:
    """Which Releases does this photo, base or code version touch?"""
    from likeness.lineage import audit as touch
    from tasks.runtime import Tools

    if sum(x is not None for x in (photo, base, code)) != 1:
        raise RecipeError("name exactly one of --photo, --base, --code")
    store = Tools(load_settings(config)).store
    releases = [r.plain() for r in touch(store, photo=photo, base=base, code=code)]
    forgotten = len(list(store.list("tombstones/")))
    if as_json:
        print_json({"releases": releases, "forgotten": forgotten})
    else:
        for r in releases:
            typer.echo(f"{r['model']} version {r['version']}  (subject {r['subject']})")
        if not releases:
            typer.echo("no Release is touched")
        if forgotten:
            typer.echo(f"{forgotten} forgotten subjects cannot be asked about: nothing of them is kept")


@app.command()
def forget(subject: Annotated[str, typer.Argument(help="The subject to erase; the id cannot be used again.")],
           yes: Annotated[bool, typer.Option("--yes", help="Do not ask. Needed where nobody can be asked.")] = False,
           canary: Annotated[list[str] | None, typer.Option(help="One more word that the scan looks for; may be given several times.")] = None,
           as_json: Json = False, config: Config = None) -> None:
    """Erase a subject from the store, MLflow, Prefect and the reports, search all of them for what is left, and print a receipt. Run it again after a crash."""
    from flows.forget import forget as erase
    from tasks.runtime import Tools

    tools = Tools(load_settings(config))
    if not yes:
        if not sys.stdin.isatty():
            raise RecipeError("nobody can be asked here whether to erase for good: add --yes")
        typer.confirm(f"Erase {subject} for good? Nothing brings them back.", abort=True, err=True)
    receipt = erase(tools, subject, canaries=canary or (), on_step=lambda name: err.print(f"done: {name}"))
    if as_json:
        print_json(receipt.plain() | {"clean": receipt.clean})
    else:
        table = Table("searched", "objects", "hits", title=f"receipt {receipt.receipt}, {receipt.forgotten_on}")
        for name, area in receipt.scan.items():
            table.add_row(name, str(area.objects), str(area.hits))
        Console().print(table, *(f"not ours to delete: {what}" for what in receipt.left), sep="\n")
    raise typer.Exit(0 if receipt.clean else 1)


@app.command()
def doctor(as_json: Json = False, config: Config = None) -> None:
    """Probe what a run needs: settings, store, base, faces, registry."""
    from flows.doctor import probe

    checks = probe(load_settings(config))
    if as_json:
        print_json({"checks": [{"name": name, "ok": ok, "message": words} for name, ok, words in checks]})
    else:
        for name, ok, words in checks:
            Console().print(f"{'[green]ok[/]   ' if ok else '[red]FAIL[/] '} {name}: {words}")
    raise typer.Exit(0 if all(ok for _, ok, _ in checks) else 1)


@app.command(name="show-config")
def show_config(as_json: Json = False, config: Config = None) -> None:
    """The settings in force, secrets masked, and where each comes from."""
    rows = load_settings(config).explain()
    if as_json:
        print_json({key: {"value": value, "source": source} for key, value, source in rows})
    else:
        for key, value, source in rows:
            typer.echo(f"{key} = {value}   # {source}")


def _show_result(result: dict[str, Any]) -> None:
    table = Table("score", "value", title=f"{result['subject']}: {result['verdict']}")
    for name, value in result["scores"].items():
        table.add_row(name.replace("_", " "), "not measured" if value is None else f"{value:.2f}")
    console = Console()
    console.print(table)
    if len(result["attempts"]) > 1:
        console.print(_side_by_side(result["attempts"]))
    for reason in result["reasons"]:
        console.print(f"  {reason['message']}")
    if following := result["next"]:
        console.print(f"next: {following['why']}" + (f"; to allow it, {following['how']}" if following["how"] else ""), markup=False)
    if result["release"]:
        console.print(f"registered as {result['release']['model']} version {result['release']['version']}")
    console.print(f"report: {result['report']}", soft_wrap=True)


def _side_by_side(attempts: list[dict[str, Any]]) -> Table:
    """One column for each attempt, the one that counts in bold."""
    table = Table("", *(f"[bold]attempt {n}[/]" if a["counts"] else f"attempt {n}" for n, a in enumerate(attempts, 1)))
    table.add_row("method", *(a["method"] for a in attempts))
    table.add_row("why", *(escape(a["why"]) for a in attempts))
    table.add_row("verdict", *(a["verdict"] for a in attempts))
    for name in dict.fromkeys(name for a in attempts for name in a["scores"]):
        values = [a["scores"].get(name) for a in attempts]
        table.add_row(name.replace("_", " "), *("not measured" if value is None else f"{value:.2f}" for value in values))
    return table


def main() -> None:
    """Entry point: errors become one message and an exit code."""
    try:
        code = app(standalone_mode=False)          # click hands an Exit's code back as the return value
        sys.exit(code if isinstance(code, int) else 0)
    except LikenessError as e:
        err.print(f"[bold red]{e.code}[/]: {e.message}", highlight=False)
        sys.exit(e.exit_code)
    except Exception as e:
        name = type(e).__name__
        if name in ("UsageError", "BadParameter", "MissingParameter", "NoSuchOption", "NoArgsIsHelpError", "Abort"):
            e.show() if hasattr(e, "show") else err.print(str(e))
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
