// Lists that are threaded through their members, so that to put one in never needs memory.
//
// A member names its neighbours itself. Nothing here locks: a list is guarded by whatever guards its owner.
#pragma once

#include <cstddef>

namespace tierstore {

// First in, first out. T has `T* next_in_line`; a member is in one line at a time.
template <typename T>
class Line {
 public:
  bool empty() const { return first_ == nullptr; }

  void push(T& member) {
    member.next_in_line = nullptr;
    (first_ == nullptr ? first_ : last_->next_in_line) = &member;
    last_ = &member;
  }

  // Returns the member that came first, null if the line is empty.
  T* pop() {
    T* member = first_;
    if (member != nullptr) first_ = member->next_in_line;
    return member;
  }

 private:
  T* first_ = nullptr;
  T* last_ = nullptr;
};

// A set whose members leave in any order. T has `T* before` and `T* after`.
template <typename T>
class Ring {
 public:
  size_t size() const { return size_; }
  T* first() const { return first_; }

  void add(T& member) {
    member.before = nullptr;
    member.after = first_;
    if (first_ != nullptr) first_->before = &member;
    first_ = &member;
    ++size_;
  }

  void remove(T& member) {
    (member.before == nullptr ? first_ : member.before->after) = member.after;
    if (member.after != nullptr) member.after->before = member.before;
    --size_;
  }

 private:
  T* first_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tierstore
