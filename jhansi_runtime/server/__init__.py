"""The process around the HTTP API: its sockets, its supervisor, its end. Neither it nor api/ knows of the other.

serve       composes settings, keys, runtime and application, and runs them
httpd       uvicorn over any number of sockets, until this process is told to end
listening   TCP, the Unix socket, and sockets that a supervisor passes
supervision what systemd is told
unit        the systemd units of --install-unit
"""
