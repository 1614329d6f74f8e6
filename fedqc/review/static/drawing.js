// How the viewer draws. NiiVue's own programs look up much for each voxel of each layer, and work out gradients
// for renderings; without a GPU that takes seconds. Here image and planes have short programs, gradients have
// none, and label and errors are coloured together, outside of WebGL.

const PLACE = `#version 300 es
in vec3 vPos;
out vec2 place;
void main() {
  place = vPos.xy;
  gl_Position = vec4(vPos.xy * 2.0 - 1.0, 0.0, 1.0);
}`;
const grey = (sampler) => `#version 300 es
precision highp float;
in vec2 place;
out vec4 color;
uniform highp ${sampler} intensityVol;
uniform mat4 mtx;
uniform float coordZ;
uniform float scl_slope;
uniform float scl_inter;
uniform float cal_min;
uniform float cal_max;
void main() {
  vec4 at = vec4(place, coordZ, 1.0) * mtx;
  float value = scl_slope * float(texture(intensityVol, at.xyz).r) + scl_inter;
  color = vec4(vec3(clamp((value - cal_min) / max(cal_max - cal_min, 1e-5), 0.0, 1.0)), 1.0);
}`;
const PLANE = `#version 300 es
in vec3 pos;
out vec3 place;
uniform int axCorSag;
uniform float slice;
uniform mat4 mvpMtx;
uniform mat4 frac2mm;
void main() {
  place = axCorSag == 0 ? vec3(pos.xy, slice) : axCorSag == 1 ? vec3(pos.x, slice, pos.y) : vec3(slice, pos.xy);
  gl_Position = mvpMtx * frac2mm * vec4(place, 1.0);
}`;
const COLOURS_OVER_GREY = `#version 300 es
precision highp float;
in vec3 place;
out vec4 color;
uniform highp sampler3D volume;
uniform highp sampler3D overlay;
void main() {
  vec4 over = texture(overlay, place);
  color = vec4(mix(texture(volume, place).rgb, over.rgb, over.a), 1.0);
}`;
const NOTHING = `#version 300 es
void main() {}`;
const [VOLUME_UNIT, OVERLAY_UNIT] = [0, 2]; // where NiiVue has them

// Gives the viewer its canvas, with the programs above in place of all of NiiVue's that read volumes: to make
// those, which draw meshes and renderings too, takes most of the time until something is seen.
export async function attach(viewer, canvas) {
  viewer.meshShaders = [];
  const context = WebGL2RenderingContext.prototype;
  const { shaderSource } = context;
  context.shaderSource = function (shader, source) {
    shaderSource.call(this, shader, source.includes("sampler3D") ? NOTHING : source);
  };
  try {
    await viewer.attachToCanvas(canvas);
  } finally {
    context.shaderSource = shaderSource;
  }
  const { gl } = viewer;
  const Shader = viewer.rectShader.constructor;
  viewer.orientShaderU = new Shader(gl, PLACE, grey("usampler3D"));
  viewer.orientShaderI = new Shader(gl, PLACE, grey("isampler3D"));
  viewer.orientShaderF = new Shader(gl, PLACE, grey("sampler3D"));
  viewer.sliceMMShader = new Shader(gl, PLANE, COLOURS_OVER_GREY);
  viewer.sliceMMShader.use(gl);
  gl.uniform1i(viewer.sliceMMShader.uniforms.volume, VOLUME_UNIT);
  gl.uniform1i(viewer.sliceMMShader.uniforms.overlay, OVERLAY_UNIT);
  dropGradients(viewer);
  gl.checkFramebufferStatus = () => gl.FRAMEBUFFER_COMPLETE; // asked twice a slice, and each time waited for
}

// Gradients are for renderings, and NiiVue works them out for each volume: what it draws for them is dropped.
function dropGradients(viewer) {
  const { gl } = viewer;
  const drop = () => {
    gl.drawArrays = () => {};
  };
  viewer.blurShader = viewer.sobelFirstOrderShader = { uniforms: {}, use: drop };
  const { refreshLayers } = viewer;
  viewer.refreshLayers = (...layer) => {
    try {
      refreshLayers.apply(viewer, layer);
    } finally {
      delete gl.drawArrays; // that of all contexts again
    }
  };
}

// Lays colours over the image.
//   label    of each voxel, right to left fastest, the number of its class from 1 on, 0 where there is none
//   errors   of each voxel, per cent
//   looks    colors ("#rrggbb", of the classes), opacity and isContour of the label; errorColor, errorOpacity, from
export function overlay(viewer, label, errors, looks) {
  const [nx, ny, nz] = viewer.volumes[0].dimsRAS.slice(1, 4);
  const [row, plane] = [nx, nx * ny];
  const table = colorsOf(looks);
  const n = looks.colors.length + 1;
  const colors = new Uint32Array(plane * nz);
  let [first, last] = [colors.length, -1]; // that have a colour
  for (let at = 0; at < colors.length; at++) {
    const is = label[at];
    const error = errors[at] > looks.from ? Math.min(errors[at], 100) : 0;
    if (is === 0 && error === 0) continue;
    const inside =
      looks.isContour &&
      label[at - 1] === is && label[at + 1] === is &&
      label[at - row] === is && label[at + row] === is &&
      label[at - plane] === is && label[at + plane] === is;
    colors[at] = table[error * n + (inside ? 0 : is)];
    first = Math.min(first, at);
    last = at;
  }
  const { gl } = viewer;
  gl.deleteTexture(viewer.overlayTexture);
  viewer.overlayTexture = gl.createTexture();
  gl.activeTexture(gl.TEXTURE0 + OVERLAY_UNIT);
  gl.bindTexture(gl.TEXTURE_3D, viewer.overlayTexture);
  for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_3D, filter, gl.NEAREST);
  for (const side of [gl.TEXTURE_WRAP_R, gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_3D, side, gl.CLAMP_TO_EDGE);
  gl.texStorage3D(gl.TEXTURE_3D, 1, gl.RGBA8, nx, ny, nz);
  if (last < 0) return; // a new texture is transparent
  const [from, to] = [Math.floor(first / plane), Math.floor(last / plane) + 1];
  const bytes = new Uint8Array(colors.buffer, 4 * from * plane, 4 * (to - from) * plane);
  gl.texSubImage3D(gl.TEXTURE_3D, 0, 0, 0, from, nx, ny, to - from, gl.RGBA, gl.UNSIGNED_BYTE, bytes);
}

// What each class looks like, the background first, under each per cent of error: the surer, the more colour.
function colorsOf({ colors, opacity, errorColor, errorOpacity, from }) {
  const classes = [{ color: "#000000", alpha: 0 }, ...colors.map((color) => ({ color, alpha: opacity }))];
  const under = (error) => ({ color: errorColor, alpha: (errorOpacity * Math.max(0, error - from)) / (100 - from) });
  return Uint32Array.from({ length: 101 * classes.length }, (_, at) =>
    packed(classes[at % classes.length], under(Math.floor(at / classes.length))),
  );
}

function rgb(color) {
  return [1, 3, 5].map((at) => Number.parseInt(color.slice(at, at + 2), 16));
}

// A colour, with another one over it, as a number whose bytes are red, green, blue and how much they cover.
function packed(under, over) {
  const alpha = over.alpha + under.alpha * (1 - over.alpha);
  if (alpha === 0) return 0;
  const below = rgb(under.color);
  const bytes = rgb(over.color).map((one, at) => (one * over.alpha + below[at] * under.alpha * (1 - over.alpha)) / alpha);
  const [red, green, blue, cover] = [...bytes, 255 * alpha].map(Math.round);
  return ((cover << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
