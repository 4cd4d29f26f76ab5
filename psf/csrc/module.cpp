// The Python module psf._image. Its functions take buffers and release the interpreter's lock.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "image.h"

#include <exception>
#include <string>

namespace {

// Runs a function without the lock; a C++ exception becomes ValueError.
template <typename Function>
PyObject* call(Function function) {
  std::string error;
  bool failed = false;
  Py_BEGIN_ALLOW_THREADS
  try {
    function();
  } catch (const std::exception& exception) {
    error = exception.what();
    failed = true;
  }
  Py_END_ALLOW_THREADS
  if (failed) {
    PyErr_SetString(PyExc_ValueError, error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* refuse(const char* message) {
  PyErr_SetString(PyExc_ValueError, message);
  return nullptr;
}

bool holds(const Py_buffer& buffer, Py_ssize_t height, Py_ssize_t width, Py_ssize_t item) {
  return height > 0 && width > 0 && buffer.len / item / width >= height;
}

PyObject* decode_ids(PyObject*, PyObject* args) {
  Py_buffer png, ids;
  Py_ssize_t height, width;
  if (!PyArg_ParseTuple(args, "y*w*nn", &png, &ids, &height, &width)) return nullptr;
  PyObject* result = nullptr;
  if (png.len < 8 || !holds(ids, height, width, 4)) {
    result = refuse("the output is smaller than the image");
  } else {
    result = call([&] {
      psf::decode_panoptic_png(
          static_cast<const uint8_t*>(png.buf),
          static_cast<size_t>(png.len),
          static_cast<uint32_t*>(ids.buf),
          static_cast<size_t>(height),
          static_cast<size_t>(width));
    });
  }
  PyBuffer_Release(&png);
  PyBuffer_Release(&ids);
  return result;
}

PyObject* decode_pixels(PyObject*, PyObject* args) {
  Py_buffer png, pixels;
  Py_ssize_t height, width;
  int bgr;
  if (!PyArg_ParseTuple(args, "y*w*nnp", &png, &pixels, &height, &width, &bgr)) return nullptr;
  PyObject* result = nullptr;
  if (png.len < 8 || !holds(pixels, height, width, 3)) {
    result = refuse("the output is smaller than the image");
  } else {
    result = call([&] {
      psf::decode_plain_png(
          static_cast<const uint8_t*>(png.buf),
          static_cast<size_t>(png.len),
          static_cast<uint8_t*>(pixels.buf),
          static_cast<size_t>(height),
          static_cast<size_t>(width),
          bgr != 0);
    });
  }
  PyBuffer_Release(&png);
  PyBuffer_Release(&pixels);
  return result;
}

PyObject* resize_bilinear(PyObject*, PyObject* args) {
  Py_buffer image, out;
  Py_ssize_t h, w, new_h, new_w, y, x, out_h, out_w;
  if (!PyArg_ParseTuple(
          args,
          "y*(nn)(nn)(nnnn)w*",
          &image,
          &h,
          &w,
          &new_h,
          &new_w,
          &y,
          &x,
          &out_h,
          &out_w,
          &out)) {
    return nullptr;
  }
  PyObject* result = nullptr;
  const bool inside =
      y >= 0 && x >= 0 && out_h <= new_h && out_w <= new_w && y <= new_h - out_h && x <= new_w - out_w;
  if (!inside || !holds(image, h, w, 3) || !holds(out, out_h, out_w, 3)) {
    result = refuse("the window is not inside the image, or a buffer is too small");
  } else {
    const auto cast = [](Py_ssize_t n) { return static_cast<size_t>(n); };
    result = call([&] {
      psf::resize_bilinear(
          static_cast<const uint8_t*>(image.buf),
          {cast(h), cast(w)},
          {cast(new_h), cast(new_w)},
          {cast(y), cast(x), cast(out_h), cast(out_w)},
          static_cast<uint8_t*>(out.buf));
    });
  }
  PyBuffer_Release(&image);
  PyBuffer_Release(&out);
  return result;
}

PyMethodDef methods[] = {
    {"decode_ids",
     decode_ids,
     METH_VARARGS,
     "decode_ids(png, ids, height, width): write R + 256 G + 65536 B of every pixel to ids (uint32)."},
    {"decode_pixels",
     decode_pixels,
     METH_VARARGS,
     "decode_pixels(png, pixels, height, width, bgr): write (height, width, 3) bytes; plain PNGs only."},
    {"resize_bilinear",
     resize_bilinear,
     METH_VARARGS,
     "resize_bilinear(image, (h, w), (new_h, new_w), (y, x, height, width), out): Pillow's, a window."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "psf._image",
    "What loading images spends its time on.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__image() { return PyModule_Create(&module); }
