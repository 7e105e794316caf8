"""The HTTP client: Client, which waits, and AsyncClient, which awaits, with the same verbs and the same records.

    with Client("http://127.0.0.1:8700", key="jk_...") as client, client.create_sandbox("python") as sandbox:
        sandbox.put("main.py")
        print(sandbox.exec("main.py").stdout)

Theory of operation. A verb is a function that returns a Call: one request, how to read its answer, and whether it may
be sent twice (verbs.py, calls.py). A connection sends calls, again where attempts.py allows it, and raises what
problems.py makes of an error (connection.py). The two clients are the methods that verbs become by binding.py, and what
takes more than one question or an answer in pieces (blocking.py, asynchronous.py); what they make of the pieces is in
events.py and transfer.py.

It decides nothing that the server decides: no value is checked here that is checked there.
"""

from jhansi_runtime.client.asynchronous import AsyncClient, AsyncJobStream, AsyncRunHandle, AsyncSandboxHandle
from jhansi_runtime.client.blocking import Client, JobStream, RunHandle, SandboxHandle
from jhansi_runtime.client.events import Event, Output, Started

__all__ = [
    "AsyncClient",
    "AsyncJobStream",
    "AsyncRunHandle",
    "AsyncSandboxHandle",
    "Client",
    "Event",
    "JobStream",
    "Output",
    "RunHandle",
    "SandboxHandle",
    "Started",
]
