"""A small server on loopback that speaks enough of S3 for TensorStore: the folders of a folder are its buckets.

It stops by itself: with the `with` block, and its threads with the process.
"""

import contextlib
import hashlib
import http.server
import re
import threading
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

KEY = "of-the-test"
PAGE = 5  # names in an answer to a listing: a store takes several


def etag(content):
    return f'"{hashlib.md5(content).hexdigest()}"'


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1  # in one packet: a second would wait for the first's receipt

    def do_GET(self):
        place, query = self.begin()
        if place is None:
            return
        if self.bucket == place:
            return self.list_names(query)
        if not place.is_file():
            return self.fail(404, "NoSuchKey")
        content, headers, status = place.read_bytes(), {"ETag": etag(place.read_bytes())}, 200
        if self.headers.get("If-None-Match") == headers["ETag"]:
            return self.answer(304, b"", headers)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = (int(asked[1]), asked[2]) if asked[1] else (max(0, len(content) - int(asked[2])), "")
            part = content[first : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            content, status = part, 206
        self.answer(status, content, headers)

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        place, _ = self.begin()
        if place is None:
            return
        there = etag(place.read_bytes()) if place.is_file() else None
        if (wanted := self.headers.get("If-Match")) and wanted != there or self.headers.get("If-None-Match") and there:
            return self.fail(412, "PreconditionFailed")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        self.answer(200, b"", {"ETag": etag(content)})

    def do_DELETE(self):
        place, _ = self.begin()
        if place is not None:
            place.unlink(missing_ok=True)
            self.answer(204, b"", {})

    def begin(self):
        """(the file or bucket that is asked for, the query); None where it has been answered already."""
        path, _, query = self.requestline.split()[1].removeprefix("/").partition("?")  # self.path joins two slashes
        bucket, _, key = unquote(path).partition("/")
        signed = re.search(r"Credential=([^/]+)/\d+/([^/]+)/s3/", self.headers.get("Authorization", ""))
        with self.server.lock:
            self.server.asked.append((self.command, bucket, key, signed and signed[2]))
        self.bucket = self.server.root / bucket
        if not signed or signed[1] != KEY or bucket == "private":
            self.fail(403, "AccessDenied")
        elif not bucket or not self.bucket.is_dir():
            self.fail(404, "NoSuchBucket")
        else:
            return self.bucket / key, dict(parse_qsl(query))
        return None, {}

    def list_names(self, query):
        files = (p.relative_to(self.bucket).as_posix() for p in self.bucket.rglob("*") if p.is_file())
        prefix, after = query.get("prefix", ""), query.get("continuation-token", query.get("start-after", ""))
        names = sorted(name for name in files if name.startswith(prefix) and name > after)
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(self.bucket / name).stat().st_size}</Size></Contents>"
            for name in names[:PAGE]
        )
        more = f"<NextContinuationToken>{escape(names[PAGE - 1])}</NextContinuationToken>" if names[PAGE:] else ""
        truncated = str(bool(more)).lower()
        text = f"<IsTruncated>{truncated}</IsTruncated><KeyCount>{len(names[:PAGE])}</KeyCount>{entries}{more}"
        self.answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode(), {})

    def fail(self, status, code):
        self.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(content)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that has gone is no news."""


@contextlib.contextmanager
def serve(root):
    """(url, asked): the server's address, and (method, bucket, key, region of the signature) of what it is asked."""
    server = Server(("127.0.0.1", 0), Handler)
    server.root, server.asked, server.lock = root, [], threading.Lock()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
