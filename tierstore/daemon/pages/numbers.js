// The numbers of the status page: what went on between two samples, and how numbers read.
// Input: statuses as status.json has them. Output: rates, NaN if there is nothing to divide; short texts.

export const UNKNOWN = "–";
export const share = (part, whole) => (whole > 0 ? part / whole : NaN);
export const percent = (fraction) => (Number.isNaN(fraction) ? UNKNOWN : `${(100 * fraction).toFixed(1)} %`);

function scaled(number, step, units) {
  if (Number.isNaN(number)) return UNKNOWN;
  let unit = 0;
  while (number >= step && unit < units.length - 1) { number /= step; unit += 1; }
  const digits = unit === 0 && Number.isInteger(number) ? 0 : number < 10 ? 2 : number < 100 ? 1 : 0;
  return `${number.toFixed(digits)} ${units[unit]}`.trim();
}
export const bytes = (number) => scaled(number, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
export const per_second = (number) => `${count(number)}/s`.replace(" /s", "/s");
export const count = (number) => scaled(number >= 10 ? Math.round(number) : number, 1000, ["", "k", "M", "G", "T"]);
export const seconds = (ns) => (ns === Infinity ? "over 1 s" : scaled(ns, 1000, ["ns", "µs", "ms", "s"]));

export function duration(whole_s) {
  for (const [unit, size, part, part_size] of [["d", 86400, "h", 3600], ["h", 3600, "min", 60], ["min", 60, "s", 1]]) {
    if (whole_s >= size) {
      return `${Math.floor(whole_s / size)} ${unit} ${Math.floor((whole_s % size) / part_size)} ${part}`;
    }
  }
  return `${Math.floor(whole_s)} s`;
}

function quantile_ns(bounds_ns, counts, fraction) {
  const rank = fraction * counts.reduce((sum, each) => sum + each, 0);
  if (rank === 0) return NaN;
  let below = 0;
  let lower = 0;
  for (let index = 0; index < bounds_ns.length; index += 1) {
    if (counts[index] && below + counts[index] >= rank) {
      return lower + ((bounds_ns[index] - lower) * (rank - below)) / counts[index];
    }
    below += counts[index];
    lower = bounds_ns[index];
  }
  return Infinity;
}

export const keys_of = (keys) => Object.values(keys).reduce((sum, each) => sum + each, 0);
export function difference(now, before) { // of two objects of counts
  return Object.fromEntries(Object.entries(now).map(([name, value]) => [name, value - ((before || {})[name] || 0)]));
}

// What went on between two samples; since the start of the daemon if `earlier` is missing.
export function between(earlier, later) {
  const now = later.status;
  const before = earlier ? earlier.status : null;
  const counters = before ? difference(now.counters, before.counters) : now.counters;
  const keys = before ? difference(now.keys, before.keys) : now.keys;
  const latency = before
    ? now.latency.counts.map((each, index) => each - before.latency.counts[index]) : now.latency.counts;
  return { seconds: before ? later.at_s - earlier.at_s : NaN, counters, keys,
    hit: 1 - share(keys.nvme, keys_of(keys)),
    p50: quantile_ns(now.latency.bounds_ns, latency, 0.5), p99: quantile_ns(now.latency.bounds_ns, latency, 0.99) };
}
