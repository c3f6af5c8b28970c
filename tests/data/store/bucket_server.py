"""A small server on loopback that speaks enough of S3 or GCS for TensorStore: a folder's folders are its buckets."""

import hashlib
import json
import re
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

import loopback

KEY = "of-the-test"
PAGE = 5  # names in an answer to a listing: a store takes several


class Handler(loopback.Handler):
    """Shared by the two protocols."""

    protocol_version, wbufsize = "HTTP/1.1", -1  # in one packet: a second would wait for the first's receipt

    def address(self):
        """(the path, which self.path would have with two slashes joined, the query)"""
        path, _, query = self.requestline.split()[1].partition("?")
        return path, dict(parse_qsl(query))

    def find(self, bucket, key, *more):
        """The file, or for no key the bucket; None where the answer is an error, which has been sent."""
        with self.server.lock:
            self.server.asked.append((self.command, bucket, key, *more))
        self.bucket = self.server.root / bucket
        if not self.allowed() or bucket == "private" or (bucket == "unlisted" and not key):
            self.fail(403, "AccessDenied")
        elif not bucket or not self.bucket.is_dir():
            self.fail(404, "NoSuchBucket")
        else:
            return self.bucket / key

    def page(self, prefix, after):
        """(names, the last of them where there are more)"""
        folder = self.bucket / prefix.rpartition("/")[0]
        files = (p.relative_to(self.bucket).as_posix() for p in folder.rglob("*") if p.is_file())
        names = sorted(name for name in files if name.startswith(prefix) and name > after)
        return names[:PAGE], names[PAGE - 1] if names[PAGE:] else None

    def send_file(self, place):
        if not place.is_file():
            return self.fail(404, "NoSuchKey")
        content, status = place.read_bytes(), 200
        headers = self.version(content)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = (int(asked[1]), asked[2]) if asked[1] else (max(0, len(content) - int(asked[2])), "")
            part = content[first : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            content, status = part, 206
        self.answer(status, content, headers)

    def take_file(self, place, allowed):
        """Write the body where the version that is there allows it, and give it; None: an error has been sent."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if place is None:
            return None
        with self.server.lock:  # of several that are allowed by the same version one wins
            there = self.version(place.read_bytes()) if place.is_file() else {}
            if may := allowed(*there.values()):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
        return content if may else self.fail(412, "PreconditionFailed")


class S3(Handler):
    """Buckets in the path. More of what is asked: the region of the signature."""

    def allowed(self):
        return self.signed and self.signed[1] == KEY

    def version(self, content):
        return {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}

    def begin(self):
        path, self.query = self.address()
        bucket, _, key = unquote(path.removeprefix("/")).partition("/")
        self.signed = re.search(r"Credential=([^/]+)/\d+/([^/]+)/s3/", self.headers.get("Authorization", ""))
        return self.find(bucket, key, self.signed and self.signed[2])

    def do_GET(self):
        if (place := self.begin()) is None:
            return
        if place != self.bucket:
            return self.send_file(place)
        names, more = self.page(self.query.get("prefix", ""), self.query.get("continuation-token", ""))
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(self.bucket / name).stat().st_size}</Size></Contents>"
            for name in names
        )
        token = f"<NextContinuationToken>{escape(more)}</NextContinuationToken>" if more else ""
        text = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated><KeyCount>{len(names)}</KeyCount>{entries}{token}"
        self.answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode(), {})

    do_HEAD = do_GET

    def do_PUT(self):
        wanted, new = self.headers.get("If-Match"), "If-None-Match" in self.headers
        place = self.begin()
        content = self.take_file(place, lambda there=None: wanted in (None, there) and not (new and there))
        if content is not None:
            self.answer(200, b"", self.version(content))

    def do_DELETE(self):
        if (place := self.begin()) is not None:
            place.unlink(missing_ok=True)
            self.answer(204, b"", {})

    def fail(self, status, code):
        self.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), {})


class GCS(Handler):
    """Its JSON API."""

    def allowed(self):
        return True  # TensorStore keeps a process's credentials

    def version(self, content):
        return {"x-goog-generation": 1 + int(hashlib.md5(content).hexdigest()[:12], 16)}

    def begin(self):
        path, self.query = self.address()
        bucket, key = re.fullmatch("(?:/upload)?/storage/v1/b/([^/]*)/o/?(.*)", path).groups()
        return self.find(bucket, unquote(key) or self.query.get("name", ""))

    def metadata(self, name):
        content = (self.bucket / name).read_bytes()
        (generation,) = self.version(content).values()
        return {"name": name, "generation": str(generation), "size": str(len(content))}

    def do_GET(self):
        if (place := self.begin()) is None:
            return
        if place != self.bucket:
            return self.send_file(place)
        # Of what we list, everything from startOffset to endOffset begins with startOffset.
        token = bytes.fromhex(self.query.get("pageToken", "")).decode()
        names, more = self.page(self.query.get("startOffset", ""), token)
        found = {"items": [self.metadata(name) for name in names]}
        found |= {"nextPageToken": more.encode().hex()} if more else {}  # no letter that a URL would need to escape
        self.answer(200, json.dumps(found).encode(), {})

    def do_POST(self):
        place = self.begin()
        wanted = self.query.get("ifGenerationMatch")
        if self.take_file(place, lambda there=0: wanted in (None, str(there))) is not None:
            self.answer(200, json.dumps(self.metadata(self.query["name"])).encode(), {})

    do_DELETE = S3.do_DELETE

    def fail(self, status, code):
        self.answer(status, json.dumps({"error": {"code": status, "message": code}}).encode(), {})


def serve(root, handler):
    """(url, asked): the server's address, and (method, bucket, key, ...) of what it is asked."""
    return loopback.serve(handler, root=root)
