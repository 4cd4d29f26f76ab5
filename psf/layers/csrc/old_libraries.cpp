#include "old_libraries.h"

#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
// Functions of the headers that newer versions of libstdc++ have compiled already.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

namespace std {

void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}

}  // namespace std
#endif
