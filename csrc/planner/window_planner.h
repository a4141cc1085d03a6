// The windows that boxes are computed in, as WindowPlanner of lidnet_fast/extractors/windows.py plans them.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "axis.h"
#include "pairs.h"

namespace lid {

constexpr size_t kMostAxes = 3;

// Of each axis, depth or rows first; {0, 0} beyond the last.
using Ranges = std::array<Range, kMostAxes>;
using Sizes = std::array<int64_t, kMostAxes>;

struct Window {
  int64_t image;
  Ranges units;
};

struct WindowPlan {
  std::vector<Window> windows;
  std::vector<int64_t> window_of_box;  // -1 where its whole image is computed
  std::map<int64_t, double> whole;     // image -> what its windows would cost
  double cost = 0;                     // of all windows
};

class WindowPlanner {
 public:
  std::vector<Axis> axes;
  // Of a cell of each map. Like cells, they are whole numbers: sums up to 2^53 don't depend on their order, so that this
  // planner and the one in Python, which compare them, decide alike.
  std::vector<double> map_costs;
  double kind_cost, window_penalty;
  size_t most_windows;

  // Windows for boxes, (image, low and then high corner, as x, y or x, y, z); whole images from `whole_cost` on.
  WindowPlan plan(const double* boxes, int64_t count, double whole_cost, bool aligned, bool share_kinds) const {
    const int64_t dimensions = static_cast<int64_t>(axes.size()), width = 1 + 2 * dimensions;
    std::map<int64_t, std::vector<int64_t>> boxes_of_image;
    for (int64_t k = 0; k < count; ++k) boxes_of_image[static_cast<int64_t>(boxes[k * width])].push_back(k);
    WindowPlan plan;
    plan.window_of_box.assign(count, -1);
    for (const auto& [image, members] : boxes_of_image) {
      std::vector<Ranges> needs;
      for (const int64_t k : members) {
        const double* box = boxes + k * width;
        Ranges units{};
        for (int64_t a = 0; a < dimensions; ++a) {
          units[a] = axes[a].units_of(box[dimensions - a], box[2 * dimensions - a], aligned);
        }
        needs.push_back(units);
      }
      std::vector<Window> windows;
      const std::vector<int64_t> window_of_need = merge(needs, image, windows);
      if (share_kinds) share(windows);
      const double cost = cost_of(windows);
      if (cost >= whole_cost) {
        plan.whole[image] = cost;
        continue;
      }
      for (size_t i = 0; i < members.size(); ++i) {
        plan.window_of_box[members[i]] = static_cast<int64_t>(plan.windows.size()) + window_of_need[i];
      }
      plan.windows.insert(plan.windows.end(), windows.begin(), windows.end());
    }
    if (share_kinds) share(plan.windows);
    plan.cost = cost_of(plan.windows);
    return plan;
  }

 private:
  // Of a window, in multiply-adds of one pass through the layers.
  double cost(const Sizes& sizes) const {
    double total = 0;
    for (size_t map = 0; map < map_costs.size(); ++map) {
      double cells = map_costs[map];
      for (size_t a = 0; a < axes.size(); ++a) cells *= axes[a].maps[map].of(sizes[a]);
      total += cells;
    }
    return total;
  }

  double cost_of(const std::vector<Window>& windows) const {
    std::set<std::pair<std::array<Edge, kMostAxes>, Sizes>> kinds;
    double total = 0;
    for (const Window& window : windows) {
      kinds.emplace(edges(window.units), sizes(window.units));
      total += cost(sizes(window.units));
    }
    return window_penalty * (static_cast<double>(kinds.size()) * kind_cost + total);
  }

  static Sizes sizes(const Ranges& units) { return {units[0].size(), units[1].size(), units[2].size()}; }

  std::array<Edge, kMostAxes> edges(const Ranges& units) const {
    std::array<Edge, kMostAxes> result{};
    for (size_t a = 0; a < axes.size(); ++a) result[a] = axes[a].edge(units[a]);
    return result;
  }

  Ranges fit(const Ranges& needed) const {
    Ranges result{};
    for (size_t a = 0; a < axes.size(); ++a) result[a] = axes[a].fit(needed[a]);
    return result;
  }

  static Ranges hull(const Ranges& one, const Ranges& other) {
    return {lid::hull(one[0], other[0]), lid::hull(one[1], other[1]), lid::hull(one[2], other[2])};
  }

  // Appends the windows for what boxes need, and returns that of each box: those that cost less together are one.
  std::vector<int64_t> merge(const std::vector<Ranges>& needs, int64_t image, std::vector<Window>& windows) const {
    std::vector<Ranges> needed;
    std::vector<int64_t> result = distinct(needs, needed);
    const auto cost_of_need = [&](const Ranges& need) { return cost(sizes(fit(need))); };
    std::vector<double> costs;
    for (const Ranges& need : needed) costs.push_back(cost_of_need(need));
    const std::vector<int64_t> ends_in = join_pairs(
        static_cast<int64_t>(needed.size()),
        [&](int64_t i, int64_t j) { return costs[i] + costs[j] - cost_of_need(hull(needed[i], needed[j])); },
        [&](int64_t kept, int64_t gone) {
          needed[kept] = hull(needed[kept], needed[gone]);
          costs[kept] = cost_of_need(needed[kept]);
        });
    std::vector<int64_t> window_of_end(needed.size());
    for (size_t i = 0; i < needed.size(); ++i) {
      if (ends_in[i] != static_cast<int64_t>(i)) continue;
      window_of_end[i] = static_cast<int64_t>(windows.size());
      windows.push_back({image, fit(needed[i])});
    }
    for (int64_t& need : result) need = window_of_end[ends_in[need]];
    return result;
  }

  // Appends at most `most_windows` needs that hold `needs`, and returns the one of each.
  std::vector<int64_t> distinct(const std::vector<Ranges>& needs, std::vector<Ranges>& needed) const {
    for (int64_t grid = 1;; grid *= 2) {
      std::map<std::array<int64_t, 2 * kMostAxes>, std::vector<int64_t>> needs_at;
      for (size_t i = 0; i < needs.size(); ++i) {
        std::array<int64_t, 2 * kMostAxes> place;
        for (size_t a = 0; a < kMostAxes; ++a) {
          place[a] = needs[i][a].start / grid;
          place[kMostAxes + a] = (needs[i][a].stop + grid - 1) / grid;
        }
        needs_at[place].push_back(static_cast<int64_t>(i));
      }
      if (needs_at.size() > most_windows) continue;
      std::vector<int64_t> result(needs.size());
      for (const auto& [place, members] : needs_at) {
        Ranges all = needs[members[0]];
        for (const int64_t i : members) {
          all = hull(all, needs[i]);
          result[i] = static_cast<int64_t>(needed.size());
        }
        needed.push_back(all);
      }
      return result;
    }
  }

  // Enlarges windows to be of fewer kinds: two kinds that differ in size only become one where that costs less.
  void share(std::vector<Window>& windows) const {
    std::map<std::array<Edge, kMostAxes>, std::vector<Window*>> windows_at;
    for (Window& window : windows) windows_at[edges(window.units)].push_back(&window);
    for (const auto& [edges, members] : windows_at) {
      std::map<Sizes, std::vector<Window*>> windows_of;
      for (Window* window : members) windows_of[sizes(window->units)].push_back(window);
      std::vector<Sizes> kinds;
      std::vector<double> counts, costs;
      for (const auto& [size, same] : windows_of) {
        kinds.push_back(size);
        counts.push_back(static_cast<double>(same.size()));
        costs.push_back(cost(size));
      }
      const auto together = [&](int64_t i, int64_t j) -> Sizes {
        return {std::max(kinds[i][0], kinds[j][0]), std::max(kinds[i][1], kinds[j][1]), std::max(kinds[i][2], kinds[j][2])};
      };
      const std::vector<int64_t> ends_in = join_pairs(
          static_cast<int64_t>(kinds.size()),
          [&](int64_t i, int64_t j) {
            const Sizes both = together(i, j);
            if (sizes(grown(members[0]->units, both)) != both) return -std::numeric_limits<double>::infinity();  // no room
            const double of_both = cost(both);
            return kind_cost - ((of_both - costs[i]) * counts[i] + (of_both - costs[j]) * counts[j]);
          },
          [&](int64_t kept, int64_t gone) {
            kinds[kept] = together(kept, gone);
            costs[kept] = cost(kinds[kept]);
            counts[kept] += counts[gone];
          });
      size_t kind = 0;
      for (const auto& [size, same] : windows_of) {
        for (Window* window : same) window->units = grown(window->units, kinds[ends_in[kind]]);
        ++kind;
      }
    }
  }

  Ranges grown(const Ranges& units, const Sizes& size) const {
    Ranges result{};
    for (size_t a = 0; a < axes.size(); ++a) result[a] = axes[a].place(units[a], size[a]);
    return result;
  }
};

}  // namespace lid
