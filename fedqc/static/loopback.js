// How a page on 127.0.0.1 asks its server, and how it gets to know the secret for that.

const secret = () => sessionStorage.getItem("fedqc") ?? "";

export async function send(address, options = {}) {
  const response = await fetch(address, { ...options, headers: { "X-Fedqc": secret(), ...options.headers } });
  if (response.ok) return response;
  const text = await response.text();
  let sentence = text;
  try {
    sentence = JSON.parse(text).error ?? text;
  } catch {
    // not one of our answers
  }
  throw new Error(sentence || response.statusText);
}

export const ask = async (address, options) => (await send(address, options)).json();

// The token behind the # is exchanged once; a page that is loaded again has the secret still.
export async function enter() {
  const token = location.hash.slice(1);
  if (!token) return;
  history.replaceState(null, "", "/");
  const { secret: found } = await ask("/api/enter", { method: "POST", body: token });
  sessionStorage.setItem("fedqc", found);
}
