// Numbers, sizes and times as people read them.

export const count = (n) => n.toLocaleString("en");

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

export function bytes(n) {
  for (const [size, unit] of [[2 ** 30, "GB"], [2 ** 20, "MB"], [2 ** 10, "KB"]]) {
    if (n >= size) return `${(n / size).toFixed(n / size < 10 ? 1 : 0)} ${unit}`;
  }
  return plural(n, "byte");
}

export function seconds(s) {
  if (s < 0.9995) return `${Math.max(1, Math.round(s * 1000))} ms`;
  if (s < 59.95) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  const minutes = Math.round(s / 60);
  return minutes < 90 ? `${minutes} min` : `${(s / 3600).toFixed(1)} h`;
}

export function until(time) {
  const left = time - Date.now() / 1000;
  if (left > 1.5 * 86400) return `${Math.round(left / 86400)} days`;
  return left > 5400 ? `${Math.round(left / 3600)} hours` : `${Math.max(1, Math.round(left / 60))} min`;
}

// What a context is called: its first document, and how many more there are.
export function title(context) {
  const [first, ...more] = context.documents;
  return more.length ? `${first} and ${plural(more.length, "more", "more")}` : first;
}
