// A question that children of this process answer, each for itself: one that faults takes nothing with it.
//
// The answer is a byte in a pipe, not an exit status: where SIGCHLD is ignored, as a parent may have left it, the
// system takes a child's status away before anybody can ask.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

namespace snello {

struct Child {
  pid_t pid = -1;
  int answer = -1;  // to be read
};

// `body(number)` runs in the child and says what it found.
template <typename Body>
bool start_child(Child* child, int number, const Body& body) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  child->pid = fork();
  if (child->pid == 0) {
    signal(SIGPIPE, SIG_IGN);
    const char held = body(number) ? 1 : 0;
    _exit(write(ends[1], &held, 1) == 1 ? 0 : 1);
  }
  close(ends[1]);
  child->answer = ends[0];
  if (child->pid > 0) return true;
  close(ends[0]);
  return false;
}

// Its answer; no, if it ended without one or takes longer than that, which ends it.
inline bool child_said_yes(const Child& child, int milliseconds) {
  pollfd one{child.answer, POLLIN, 0};
  int ready = 0;
  while ((ready = poll(&one, 1, milliseconds)) < 0 && errno == EINTR) {
  }
  char said = 0;
  const bool yes = ready > 0 && read(child.answer, &said, 1) == 1 && said == 1;
  close(child.answer);
  if (ready <= 0) kill(child.pid, SIGKILL);
  while (waitpid(child.pid, nullptr, 0) < 0 && errno == EINTR) {  // ECHILD where SIGCHLD is ignored: it is gone
  }
  return yes;
}

template <typename Body>
bool all_children_say_yes(int count, int milliseconds, const Body& body) {
  constexpr int kMost = 16;
  Child children[kMost];
  if (count > kMost) return false;
  int started = 0;
  while (started < count && start_child(&children[started], started, body)) ++started;
  bool yes = started == count;
  for (int i = 0; i < started; ++i) yes = child_said_yes(children[i], milliseconds) && yes;
  return yes;
}

}  // namespace snello
