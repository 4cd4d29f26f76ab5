"""The annotations of a panoptic JSON, left in their file until they are asked for."""

import json
import re
from array import array
from collections.abc import Iterator, KeysView
from typing import Any, NoReturn, TextIO

from detectron2.utils.file_io import PathManager

_CHUNK = 1 << 18  # characters read at a time
_NO_SPACE = re.compile(r"[^ \t\n\r]")
_REQUIRED = ("image_id", "file_name", "segments_info")


class PanopticAnnotations:
    """
    The annotations of a JSON in the COCO panoptic format, by image id.

    The file is read once, from end to end and without ever being in memory as a whole. Of each
    annotation its image id and its place in the file are kept: about 150 bytes.
    """

    def __init__(self, path: str) -> None:
        """
        Args:
            path: the JSON. It must not change while it is used.

        Raises:
            ValueError: it is not valid JSON, or lacks keys.
        """
        self._path = path
        self._local_path = PathManager.get_local_path(path)
        self._rows: dict[Any, int] = {}
        self._places = array("q")  # the first byte of each annotation, and that after its last
        self._categories: list[dict[str, Any]] | None = None
        # False for the test sets of benchmarks. Unlike no annotations, which is an empty data set.
        self.are_given = False
        with open(self._local_path, encoding="utf-8", newline="") as file:
            self._find(_JsonReader(file, path))
        if self._categories is None:
            raise ValueError(f"'{path}' lacks 'categories'; the COCO panoptic format needs them.")
        self.categories: list[dict[str, Any]] = self._categories

    @property
    def image_ids(self) -> KeysView[Any]:
        """In the order of the file."""
        return self._rows.keys()

    def read(self, image_id: Any) -> dict[str, Any]:
        """
        The annotation of one of ``image_ids``: file_name and segments_info.

        Raises:
            ValueError: the file was changed.
        """
        row = self._rows[image_id]
        start, stop = self._places[2 * row : 2 * row + 2]
        with open(self._local_path, "rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        try:
            annotation = json.loads(content)
        except ValueError:
            annotation = None
        if not isinstance(annotation, dict) or annotation.get("image_id") != image_id:
            raise ValueError(f"'{self._path}' was changed while in use. Start again with this one.")
        return annotation

    def _find(self, reader: "_JsonReader") -> None:
        for _ in reader.items("{}"):
            key = reader.value()
            reader.skip(":")
            if key == "categories":
                self._categories = reader.value()
            elif key == "annotations":
                self.are_given = True
                for _ in reader.items("[]"):
                    reader.peek()
                    start = reader.offset
                    self._add(reader.value(), start, reader.offset)
            elif reader.peek() == "[":
                for _ in reader.items("[]"):
                    reader.value()
            else:
                reader.value()
        if reader.peek():
            reader.fail("something follows the end")

    def _add(self, annotation: Any, start: int, stop: int) -> None:
        missing = [k for k in _REQUIRED if not isinstance(annotation, dict) or k not in annotation]
        if missing:
            raise ValueError(
                f"An annotation of '{self._path}' lacks {missing}; the COCO panoptic format needs "
                "them. Complete the JSON (tools/check_dataset.py says what it lacks)."
            )
        self._rows[annotation["image_id"]] = len(self._places) // 2
        self._places.extend((start, stop))


class _JsonReader:
    """Walks through a JSON file value by value; the caller opens what is too large for one."""

    def __init__(self, file: TextIO, path: str) -> None:
        """
        Args:
            file: opened with ``newline=""``, so that bytes can be counted.
            path: for the messages.
        """
        self._file = file
        self._path = path
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0  # in the text
        self.offset = 0  # the same place in the file, in bytes

    def items(self, brackets: str) -> Iterator[None]:
        """Stop before each item of an object ("{}") or an array ("[]")."""
        self.skip(brackets[0])
        if self.peek() != brackets[1]:
            yield
            while self.peek() == ",":
                self.skip(",")
                yield
        self.skip(brackets[1])

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            character = _NO_SPACE.search(self._text, self._at)
            self._advance(character.start() if character else len(self._text))
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at : self._at + 1]

    def skip(self, character: str) -> None:
        """Step over the next character, which must be this one."""
        if self.peek() != character:
            self.fail(f"'{character}' expected")
        self._advance(self._at + 1)

    def value(self) -> Any:
        """Step over the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._read_more():
                    continue
                self.fail(error.msg, error)
            if end == len(self._text) and self._read_more():
                continue  # more digits of a number may follow
            self._advance(end)
            return value

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(
            f"'{self._path}' is not valid JSON: {what} (byte {self.offset}). Copy it again."
        ) from cause

    def _advance(self, end: int) -> None:
        self.offset += len(self._text[self._at : end].encode())
        self._at = end

    def _read_more(self) -> bool:
        """Whether there was more to read. What has been stepped over is let go."""
        # At least as much as there is: a value that spans many chunks is decoded few times.
        try:
            more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            self.fail("it is not UTF-8", error)
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)
