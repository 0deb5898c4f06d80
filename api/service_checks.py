"""Checks of what is served: the portal, peers, the network, and the daemon that runs."""

import errno
import socket
from pathlib import Path

from stratocache import __version__
from stratocache.api.judgement import Judgement, broken, doubtful, fine
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import Unreachable
from stratocache.fs import lio_switch
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.supervisor_status import State, read_status


def judge_portal(configuration: Configuration) -> Judgement:
    """Judge the address that iSCSI is served at."""
    address, port = configuration.iscsi.address, configuration.iscsi.port
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return _portal_fault(configuration, error)
    return fine(f"{address}:{port} is free")


def _portal_fault(configuration: Configuration, error: OSError) -> Judgement:
    where = f"{configuration.iscsi.address}:{configuration.iscsi.port}"
    if error.errno == errno.EADDRINUSE:
        if configuration.iscsi.backend == "lio" and any(lio_switch.groups()):
            return fine(f"{where} is served by this kernel")
        if _listens(configuration.api_socket):
            return fine(f"{where} is served by the running daemon")
        return broken(
            f"{where} is in use by another program",
            "Stop that (perhaps the system's tgt), or set iscsi.port to a free one.",
        )
    return broken(f"{where}: {error.strerror}", "Set iscsi.address to an address of this host.")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def judge_peers(configuration: Configuration) -> Judgement:
    """Judge what asking and serving peers needs; raises `StratocacheError` for a file that cannot be
    used."""
    settings = configuration.peers
    if not settings.hosts and not settings.listen:
        return fine("none are configured")
    from stratocache.api import peer_check  # its libraries take long to import

    peer_check.require_files(settings)
    faults = peer_check.unreachable(settings)
    if faults:
        named = "; ".join(f"{peer}: {fault}" for peer, fault in sorted(faults.items()))
        return doubtful(
            named, "Mend what is named: start that host, give both the same token and authority."
        )
    if settings.listen and _is_unserved(configuration, "peers"):
        return doubtful(
            "the running daemon does not serve peers",
            f"Restart it if peers.listen is new; else its log says why port {settings.port} cannot "
            "be used.",
        )
    days = peer_check.certificate_days(settings)
    if days is not None:
        return doubtful(
            f"the certificate is valid for {days:.0f} days",
            "Run `stratocache peers init` again and copy what it makes.",
        )
    served = f"served on port {settings.port}" if settings.listen else "not served"
    return fine(f"all of {', '.join(settings.hosts) or 'none'}; {served}")


def judge_network(configuration: Configuration) -> Judgement:
    """Judge what serving the network needs."""
    api = configuration.api
    if not api.address:
        return fine("not served")
    from stratocache.api import web_certificate

    fault = web_certificate.fault(configuration) if api.tls else None
    if fault is not None:
        return broken(fault, "Renew certificate and key, or correct [api].")
    if api.client_ca_file is not None and api.client_crl_file is not None:
        from stratocache.api.revocation import RevocationLists

        try:
            RevocationLists(api.client_crl_file, api.client_ca_file).require_usable()
        except Unreachable as error:
            return broken(
                error.message.rstrip("."),
                "Until then nobody of that authority gets in by certificate.",
            )
    if _is_unserved(configuration, "web"):
        return doubtful(
            "the running daemon does not serve the network",
            f"Restart it if api.address is new; else its log says why port {api.port} cannot be used.",
        )
    if configuration.first_token_file.exists():
        return doubtful(
            "there is no account yet",
            f"Make one with the token in {configuration.first_token_file}, or, as root, "
            "`stratocache account create NAME --role admin`.",
        )
    return fine(f"{api.address}, port {api.port}")


def _is_unserved(configuration: Configuration, child: str) -> bool:
    """Tell whether a daemon runs whose child of this name is not ready."""
    status = read_status(RunDirectory(configuration.run_dir).supervisor_status)
    if status is None:
        return False
    serving = status.children.get(child)
    return serving is None or not serving.ready


def judge_daemon(configuration: Configuration) -> Judgement:
    """Judge the daemon that runs."""
    status = read_status(RunDirectory(configuration.run_dir).supervisor_status)
    if status is None:
        return fine("not running")
    detail = f"version {status.version}, process {status.pid}, {status.state}"
    if status.state is State.FROZEN:
        return broken(
            f"{detail}: blockd crashes again and again, guests wait",
            "See the log, install a version that works, then `stratocache upgrade`.",
        )
    if status.version != __version__:
        return doubtful(
            f"{detail}; this is version {__version__}",
            "`stratocache upgrade` lets the daemon go on with this version.",
        )
    return fine(detail)
