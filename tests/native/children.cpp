// Children that say yes, say no, fault or take too long; the answers must not depend on how SIGCHLD is handled.
#include "children.h"

#include <cstdio>
#include <cstdlib>

int main(int, char** argv) {
  if (argv[1][0] == 'i') signal(SIGCHLD, SIG_IGN);
  const auto ask = [](auto body) { return snello::all_children_say_yes(4, 500, body); };
  const bool yes = ask([](int) { return true; });
  const bool one_no = ask([](int number) { return number != 2; });
  const bool faulted = ask([](int number) {
    if (number == 1) raise(SIGKILL);
    return true;
  });
  const bool late = ask([](int number) {
    if (number == 3) sleep(30);
    return true;
  });
  std::printf("%d%d%d%d", yes, one_no, faulted, late);
  return 0;
}
