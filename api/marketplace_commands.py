"""`stratocache marketplace`: publish an image's metadata, check documents, serve a folder of them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option, plain
from stratocache.cache import constraints, credentials, document, publication
from stratocache.cache.configuration import Configuration
from stratocache.cache.entry import Compression, EndorsedIndex, Entry, ImageFormat
from stratocache.cache.errors import InvalidInput, NotVerified
from stratocache.cache.metadata import DATE_FORMAT
from stratocache.cache.signature import LegacySha1
from stratocache.cache.validation import Rules, validate_file

Command = TypeVar("Command", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUTPUT = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def marketplace() -> None:
    """Publish and check Marketplace metadata."""


def _signing_options(command: Command) -> Command:
    options = (
        click.option("--key", "--pem-key", "key", type=_FILE, help="Private RSA key (PEM)."),
        click.option(
            "--certificate", "--pem-cert", "certificate", type=_FILE, help="Its certificate (PEM)."
        ),
        click.option("--p12-cert", type=_FILE, help="Key and certificate in one PKCS#12 file."),
        click.option(
            "--password", "--p12-password", "password", envvar="STRATUSLAB_P12_PASSWORD",
            help="Password of the key; the environment hides it from other users.",
        ),
        click.option("--email", help="Your address, when the certificate does not name it."),
        click.option("--sha1", is_flag=True, help="Sign with SHA-1, for readers of before 2016."),
        click.option("--output", "-o", type=_OUTPUT, help="Write here, not over FILE."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@marketplace.command(
    "build-metadata",
    epilog=examples(
        "stratocache marketplace build-metadata base.img --location https://example.org/images/base.img",
    ),
)
@click.argument("image", type=_FILE)
@click.option("--output", "-o", type=_OUTPUT, help="File to write.")
@click.option("--location", multiple=True, help="URL of the image; may be repeated.")
@click.option(
    "--compression",
    type=click.Choice(get_args(Compression)),
    help="Compression at the locations; default: that of IMAGE's name.",
)
@click.option(
    "--format",
    type=click.Choice(get_args(ImageFormat)),
    default="raw",
    show_default=True,
    help="Of IMAGE, decompressed.",
)
@click.option("--type", default="base", show_default=True, help="What the image is, in a word.")
@click.option(
    "--kind",
    type=click.Choice(["machine", "disk"]),
    default="machine",
    show_default=True,
    help="Whether it boots.",
)
@click.option("--author", help="Who made the image.")
@click.option("--email", help="The author's address, put beside the name.")
@click.option("--publisher", help="Who vouches for it: an organisation.")
@click.option("--os", help="Such as debian.")
@click.option("--os-version", help="Such as 12.")
@click.option("--os-arch", help="Such as x86_64.")
@click.option("--version", "--image-version", "version", help="Of the image.")
@click.option("--title", help="Of the image, in a line.")
@click.option("--comment", help="Description of the image.")
@click.option("--tag", help="A name that stays when versions change.")
@click.option(
    "--disks-bus", type=click.Choice(["ide", "scsi", "virtio"]), help="That it boots from."
)
@click.option("--hypervisor", "hypervisors", multiple=True, help="That runs it; may be repeated.")
@click.option(
    "--valid-days",
    type=click.IntRange(1, 36500),
    default=publication.DEFAULT_VALID_DAYS,
    show_default=True,
    help="Until the metadata expires.",
)
@click.option("--md5", is_flag=True, help="Compute an MD5 too.")
@click.option("--index", help="URL at which the chunk index of `marketplace index` will be served.")
@click.option("--index-file", type=_FILE, help="That index; default: IMAGE.caibx beside IMAGE.")
@json_option
@click.pass_obj
def build_metadata(
    session: Session,
    /,
    image: Path,
    output: Path | None,
    email: str | None,
    md5: bool,
    index: str | None,
    index_file: Path | None,
    **words: Any,
) -> None:
    """Measure IMAGE and write its unsigned metadata.

    Size and digests are those of the decompressed image. Without --output the file is named
    os-osversion-arch-type-version.xml. With --index a host can launch before it has the image;
    that of a qcow2 file is made of the raw image that it was converted from.
    """
    words["locations"] = words.pop("location")
    words["compression"] = words["compression"] or publication.compression_of(image)
    description = publication.Description(**words)
    if email is not None:
        author = f"{description.author} <{email}>" if description.author else email
        description = replace(description, author=author)
    target = output or Path(_default_name(description))
    measurement = publication.measure(image, md5=md5)
    if index is not None or index_file is not None:
        size_bytes = publication.disk_bytes(image) if description.format == "qcow2" else None
        endorsed = _index(image, index, index_file, measurement, size_bytes)
        description = replace(description, index=endorsed)
    data = publication.build_metadata(measurement, description, created=publication.now())
    publication.write(target, data)
    identifier = constraints.check(document.parse_one(data), allow_unendorsed=True).identifier
    session.show(
        {
            "file": str(target),
            "identifier": identifier,
            "size_bytes": measurement.size_bytes,
            "digests": measurement.digests,
        },
        f"{target}: {identifier}, {measurement.size_bytes} bytes",
    )


def _index(
    image: Path, url: str | None, path: Path | None, measurement: publication.Measurement,
    size_bytes: int | None,
) -> EndorsedIndex:  # fmt: skip
    if url is None:
        raise InvalidInput("index-url-missing", "Give --index, the URL of the file, too.")
    if path is None:
        name = image.name if publication.compression_of(image) == "none" else image.stem
        path = image.with_name(f"{name}.caibx")
    return publication.endorsed_index(url, path, measurement, size_bytes=size_bytes)


@marketplace.command(
    "index",
    epilog=examples(
        "stratocache marketplace index base.img --output /srv/images",
    ),
)
@click.argument("image", type=_FILE)
@click.option("--output", "-o", type=_FOLDER, help="Folder to write to; default: that of IMAGE.")
@click.option("--bootset", type=_FILE, help="What `image bootset export` wrote, to go beside it.")
@json_option
@click.pass_obj
def index_command(session: Session, image: Path, output: Path | None, bootset: Path | None) -> None:
    """Write the chunk index IMAGE.caibx and the chunk store IMAGE.castr of a raw IMAGE.

    Serve both beside each other and endorse the index with build-metadata --index: a host then
    launches the image after fetching what the boot reads. casync and desync read them too.
    """
    from stratocache.cache import bootset as boot_sets
    from stratocache.cache.indexing import index_image

    done = index_image(image, output or image.parent)
    written = {"index": str(done.index), "store": str(done.store)}
    if bootset is not None:
        content = boot_sets.read(bootset)
        boot_sets.decode(content, done.size_bytes)
        path = done.index.with_suffix(boot_sets.SUFFIX)
        boot_sets.write(path, content)
        written["bootset"] = str(path)
    session.show(
        {
            **written,
            "sha256": done.sha256,
            "size_bytes": done.size_bytes,
            "chunks": done.chunks,
            "new_chunks": done.new_chunks,
        },
        f"{done.index}: {done.size_bytes} bytes in {done.chunks} chunks, {done.new_chunks} new",
    )


@marketplace.command(
    epilog=examples(
        "stratocache marketplace sign base.xml --key me.key --certificate me.pem",
    )
)
@click.argument("file", type=_FILE)
@_signing_options
@json_option
@click.pass_obj
def sign(session: Session, /, file: Path, output: Path | None, **options: Any) -> None:
    """Endorse and sign the metadata in FILE; the unsigned text is kept as FILE.orig."""
    owner, email, sha1 = _credentials(**options)
    data = publication.endorse(
        document.read(file), owner, created=publication.now(), email=email, sha1=sha1
    )
    publication.write(output or file, data, keep_original=output is None)
    _show_endorsed(session, output or file, data)


@marketplace.command(
    epilog=examples(
        "stratocache marketplace deprecate base.xml --reason 'hole in ssh' --key me.key --certificate me.pem",
    )
)
@click.argument("file", type=_FILE)
@click.option("--reason", required=True, help="Why; readers see it.")
@_signing_options
@json_option
@click.pass_obj
def deprecate(
    session: Session, /, file: Path, reason: str, output: Path | None, **options: Any
) -> None:
    """Endorse the entry in FILE anew as deprecated; the former one is kept as FILE.orig."""
    owner, email, sha1 = _credentials(**options)
    data = publication.deprecate(
        document.read(file), owner, reason=reason, created=publication.now(), email=email, sha1=sha1
    )
    publication.write(output or file, data, keep_original=output is None)
    _show_endorsed(session, output or file, data)


@marketplace.command(
    epilog=examples(
        "stratocache marketplace validate base.xml",
        "stratocache marketplace validate --allow-unsigned base.xml",
    )
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_FILE)
@click.option(
    "--legacy-sha1",
    type=click.Choice(get_args(LegacySha1)),
    default="refuse",
    show_default=True,
    help="Whether signatures that rest on SHA-1 count.",
)
@click.option(
    "--trusted-fingerprint",
    "pinned",
    multiple=True,
    help="SHA-256 of a certificate that allow-pinned accepts, beside the configured ones.",
)
@click.option("--allow-unsigned", is_flag=True, help="Accept documents that are not signed yet.")
@json_option
@click.pass_obj
def validate(
    session: Session,
    files: tuple[Path, ...],
    legacy_sha1: LegacySha1,
    pinned: tuple[str, ...],
    allow_unsigned: bool,
) -> int:
    """Check documents; one line for each, with the fault that was found first.

    Expiry and deprecation are noted, not faults. Exit status 6 when any document is faulty.
    """
    if legacy_sha1 == "allow-pinned":
        for settings in session.configuration.catalogues.values():
            pinned += settings.trusted_fingerprints
    rules = Rules(legacy_sha1, frozenset(pinned), allow_unsigned)
    now = datetime.now(UTC)
    verdicts = [verdict for file in files for verdict in validate_file(file, rules, now=now)]
    session.show(
        {"documents": [verdict.record() for verdict in verdicts]},
        "\n".join(plain(verdict.line()) for verdict in verdicts),
    )
    faulty = any(verdict.fault is not None for verdict in verdicts)
    return NotVerified.exit_status if faulty else 0


@marketplace.command(
    epilog=examples(
        "stratocache marketplace show MMZu9WvwKIro-rtBQfDk4PsKO7_",
    )
)
@click.argument("reference")
@json_option
@click.pass_obj
def show(session: Session, reference: str) -> None:
    """Resolve REFERENCE with the configured trust and policy, and show the entry."""
    entry = _resolve(session.configuration, reference)
    session.show_fields(entry.model_dump(mode="json"))


@marketplace.command(
    epilog=examples(
        "stratocache marketplace serve /srv/metadata --images /srv/images",
    )
)
@click.argument("directory", type=_FOLDER)
@click.option("--address", default="127.0.0.1", show_default=True, help="To listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8081, show_default=True,
    help="To listen on; 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--images", type=_FOLDER,
    help="Folder of image files, served with byte ranges below /images; "
    "default: DIRECTORY/images when there is one.",
)  # fmt: skip
def serve(directory: Path, address: str, port: int, images: Path | None) -> None:
    """Serve the signed entries in DIRECTORY, and image files, until interrupted.

    Entries are found wherever they lie below DIRECTORY; new files are seen at once. With --images a
    site needs no other server: the location of an image is http://HOST:PORT/images/NAME.
    """
    from stratocache.api.marketplace import Server

    if images is None and (directory / "images").is_dir():
        images = directory / "images"

    def announce(host: str, bound_port: int) -> None:
        host = f"[{host}]" if ":" in host else host
        click.echo(f"Serving {directory} on http://{host}:{bound_port}/metadata")

    Server(directory, address=address, port=port, images=images, announce=announce).run()


def _credentials(
    key: Path | None,
    certificate: Path | None,
    p12_cert: Path | None,
    password: str | None,
    email: str | None,
    sha1: bool,
) -> tuple[credentials.Credentials, str | None, bool]:
    secret = password.encode() if password is not None else None
    if p12_cert is not None and key is None and certificate is None:
        return credentials.load_pkcs12(p12_cert, secret), email, sha1
    if key is not None and certificate is not None and p12_cert is None:
        return credentials.load_pem(key, certificate, secret), email, sha1
    raise InvalidInput("credentials-missing", "Give either --key and --certificate, or --p12-cert.")


def _show_endorsed(session: Session, path: Path, data: bytes) -> None:
    metadata = constraints.check(document.parse_one(data))
    assert metadata.endorsement is not None, "checked without leave to lack one"
    created = metadata.endorsement.created.strftime(DATE_FORMAT)
    url_path = f"{metadata.identifier}/{metadata.endorsement.email}/{created}"
    session.show(
        {"file": str(path), "identifier": metadata.identifier, "path": url_path},
        f"{path}: {url_path}",
    )


def _default_name(description: publication.Description) -> str:
    words = (
        description.os, description.os_version, description.os_arch, description.type,
        description.version,
    )  # fmt: skip
    name = "-".join(word for word in words if word)
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") + ".xml"


def _resolve(configuration: Configuration, reference: str) -> Entry:
    import trio

    from stratocache.cache.catalogue import Catalogues
    from stratocache.cache.outgoing import source_client

    async def resolve() -> Entry:
        async with source_client(configuration.fetch) as client:
            return await Catalogues(configuration, client).resolve(reference, now=datetime.now(UTC))

    return trio.run(resolve)
