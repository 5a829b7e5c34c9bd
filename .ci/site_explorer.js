// The backend of the site's explorer page: answers from data that were made with a kernel and built into the page.

const held = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const key = ({ source, layer }) => (layer == null ? source : `${source}.${layer}`);

function backendOf(picture) {
  const N = picture.about.panels[0].tokens;
  const answers = {
    open: () => [picture.about, picture.open],
    similar: (params) => {
      const row = new Int8Array(bytes(picture.similar[key(params)]).buffer, params.token * N, N); // -128: no token of the picture
      return [{ token: params.token }, [Float32Array.from(row, (value) => (value === -128 ? NaN : value / 127))]];
    },
    colours: (params) => [{}, [bytes(picture.colours[key(params)])]],
    words: (params) => {
      const maps = picture.words[key(params)];
      if (!maps) throw new Error(`These features have no text side; choose ${held.able}.`);
      const map = maps[params.text.trim().toLowerCase()];
      if (!map) throw new Error(`This page has no kernel and holds the maps of ${held.texts.join(", ")} alone; notebook 00 looks for any words.`);
      return [{}, [new Float32Array(bytes(map).buffer)]];
    },
  };
  return {
    ops: Object.keys(answers),
    texts: held.texts,
    call: async (op, params = {}) => {
      const [result, buffers] = answers[op](params);
      const views = buffers.map((each) => (typeof each === "string" ? bytes(each) : each)).map((each) => new DataView(each.buffer, each.byteOffset, each.byteLength));
      return { ...structuredClone(result), buffers: views };
    },
  };
}

const root = document.getElementById("explorer"), choice = document.getElementById("picture");
let view;
function show() {
  view?.close();
  view = createView(root, backendOf(held.pictures[choice.selectedIndex]));
}
choice.append(...held.pictures.map(({ name }) => Object.assign(document.createElement("option"), { textContent: name })));
choice.addEventListener("change", show);
show();
