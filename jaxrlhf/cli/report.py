"""``jaxrlhf report``."""

from typing import Annotated

import typer

from jaxrlhf.cli.setup import need_run


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, finished or in progress.")],
    out: Annotated[
        str, typer.Option(help="The file to write. Default: RUN/report.html, of several runs report.html here.")
    ] = "",
    png: Annotated[str, typer.Option(metavar="DIR", help="Write every chart as a PNG into this folder, too.")] = "",
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page, which follows the runs, until Ctrl-C.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --serve: the address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: 0 takes a free port.")] = 8765,
) -> None:
    """Write one HTML page about runs: curves, samples, configs. It works offline."""
    for run in runs:
        need_run(run)
    from jaxrlhf.errors import need_extra

    need_extra("jaxrlhf report", "report", "altair", "vl_convert")
    from jaxrlhf.report.images import write_images
    from jaxrlhf.report.live import make_server
    from jaxrlhf.report.page import write_page

    if png:
        typer.echo(f"{png}: {len(write_images(runs, png))} charts")
    if serve:
        with make_server(runs, host, port) as server:
            typer.echo(f"http://{host}:{server.server_address[1]}  (Ctrl-C ends it)")
            server.serve_forever()
    out = out or (f"{runs[0].rstrip('/')}/report.html" if len(runs) == 1 else "report.html")
    size = write_page(runs, out)
    typer.echo(f"{out}: {size / 1e6:.1f} MB, opens in any browser, offline")
