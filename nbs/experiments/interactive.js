// The controls of the experiments' figures, in plain JavaScript. interactive.py puts this file into the notebook's output,
// so that it works on the site, in JupyterLab and from a file, without a server and without anything fetched.
function interactive(id, kind, data, tries = 50) {
  const root = document.getElementById(id);
  if (!root) { if (tries) setTimeout(() => interactive(id, kind, data, tries - 1), 40); return; }
  const NS = 'http://www.w3.org/2000/svg';
  const add = (parent, tag, attrs = {}, text = '') => {
    const svg = ['svg', 'g', 'path', 'line', 'rect', 'text', 'circle'].includes(tag);
    const el = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
    for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
    el.textContent = text;
    parent.append(el);
    return el;
  };
  const slider = (parent, name, min, max, step, value, change) => {
    const label = add(parent, 'label', {style: 'display:grid;grid-template-columns:5.5rem 1fr 4rem;gap:.5rem;align-items:center;max-width:32rem'});
    add(label, 'span', {}, name);
    const input = add(label, 'input', {type: 'range', min, max, step, value, 'aria-label': name, style: 'width:100%;min-width:0'});
    const shown = add(label, 'output', {style: 'text-align:right;font-variant-numeric:tabular-nums'});
    input.addEventListener('input', () => change(+input.value));
    return v => { input.value = v; shown.textContent = v; };
  };
  const picture = (address, ready) => { const img = new Image(); img.onload = () => ready(img); img.src = address; };
  const paper = (parent, w, h, label) => add(parent, 'svg', {viewBox: `0 0 ${w} ${h}`, role: 'img', 'aria-label': label,
    style: `width:100%;max-width:${w}px;height:auto;display:block;font:12px sans-serif`});

  const kinds = {
    curves() {                                                          // lines over x that can be switched on and off, one by one
      const W = Math.max(280, Math.min(720, root.clientWidth || 720)), H = W > 500 ? 380 : 300, [l, r, t, b] = [52, 12, 14, 44];
      const on = new Set(data.lines.map(d => d.name)), x0 = 0, x1 = Math.max(...data.lines.flatMap(d => d.parts.flatMap(p => p.x)));
      const step = (top, n) => { const d = 10**Math.floor(Math.log10(top/n)); return [1, 2, 5, 10].map(k => k*d).find(u => top/u <= n); };
      const buttons = add(root, 'div', {style: 'display:flex;flex-wrap:wrap;gap:.3rem .9rem;margin:.3rem 0'});
      const svg = paper(root, W, H, data.label), told = add(root, 'div', {style: 'min-height:1.5em;font-size:.85rem', 'aria-live': 'polite'});
      const X = v => l + (v - x0)/(x1 - x0)*(W - l - r);
      let Y, top = 1;
      const draw = () => {
        svg.replaceChildren();
        const seen = data.lines.filter(d => on.has(d.name)), ys = seen.flatMap(d => d.parts.flatMap(p => p.y));
        top = Math.max(...ys, 1e-9)*1.05;
        Y = v => H - b - v/top*(H - t - b);
        for (let v = 0; v <= top; v += step(top, 6)) {
          add(svg, 'line', {x1: l, x2: W - r, y1: Y(v), y2: Y(v), stroke: 'currentColor', 'stroke-opacity': .15});
          add(svg, 'text', {x: l - 8, y: Y(v) + 4, 'text-anchor': 'end', fill: 'currentColor'}, +v.toPrecision(6));
        }
        for (let v = 0; v <= x1; v += step(x1, W > 500 ? 6 : 4))
          add(svg, 'text', {x: Math.min(X(v), W - r - 14), y: H - b + 18, 'text-anchor': 'middle', fill: 'currentColor'}, (+v.toPrecision(6)).toLocaleString('en'));
        add(svg, 'text', {x: (l + W)/2, y: H - 6, 'text-anchor': 'middle', fill: 'currentColor'}, data.x);
        add(svg, 'text', {x: 12, y: (H - b)/2, 'text-anchor': 'middle', fill: 'currentColor', transform: `rotate(-90 12 ${(H - b)/2})`}, data.y);
        for (const d of seen) for (const p of d.parts)
          add(svg, 'path', {d: p.x.map((x, i) => `${i ? 'L' : 'M'}${X(x).toFixed(1)} ${Y(p.y[i]).toFixed(1)}`).join(''), fill: 'none', stroke: d.color,
            'stroke-width': p.width, 'stroke-dasharray': d.dash ? '6 4' : '', 'data-name': d.name});
      };
      for (const d of data.lines) {
        const label = add(buttons, 'label', {style: 'display:inline-flex;gap:.35rem;align-items:center;cursor:pointer'});
        const box = add(label, 'input', {type: 'checkbox'});
        box.checked = true;
        add(label, 'span', {style: `width:1.4rem;border-top:3px ${d.dash ? 'dashed' : 'solid'} ${d.color}`});
        add(label, 'span', {}, d.name);
        box.addEventListener('change', () => { box.checked ? on.add(d.name) : on.delete(d.name); draw(); });
      }
      svg.addEventListener('pointermove', e => {
        const box = svg.getBoundingClientRect(), x = x0 + ((e.clientX - box.left)/box.width*W - l)/(W - l - r)*(x1 - x0);
        const at = p => p.x.reduce((best, v, i) => Math.abs(v - x) < Math.abs(p.x[best] - x) ? i : best, 0);
        const said = data.lines.filter(d => on.has(d.name)).map(d => `${d.name}: ` + d.parts.map(p => `${p.y[at(p)].toFixed(1)} ${p.name}`).join(', '));
        told.textContent = said.join(' · ');
      });
      draw();
    },

    light() {                                                           // a photo under the light of three alphas
      const row = add(root, 'div', {style: 'display:flex;flex-wrap:wrap;gap:1rem;align-items:center'});
      const canvas = add(row, 'canvas', {role: 'img', 'aria-label': data.label, style: 'width:min(100%,240px);image-rendering:auto'});
      const side = add(row, 'div', {style: 'flex:1 1 17rem;min-width:0'}), alphas = [0, 0, 0];
      picture(data.photo, img => {
        [canvas.width, canvas.height] = [img.width, img.height];
        const ctx = canvas.getContext('2d');
        ctx.drawImage(img, 0, 0);
        const before = ctx.getImageData(0, 0, img.width, img.height), after = ctx.createImageData(img.width, img.height);
        const shown = add(side, 'div', {style: 'font-size:.85rem;margin-top:.4rem'});
        const draw = () => {
          const shift = [0, 1, 2].map(c => 255*alphas.reduce((sum, a, k) => sum + a*data.axes[c][k], 0));
          for (let i = 0; i < before.data.length; i += 4) {
            for (let c = 0; c < 3; c++) after.data[i + c] = before.data[i + c] + shift[c];   // clamped to 0…255 by the array
            after.data[i + 3] = 255;
          }
          ctx.putImageData(after, 0, 0);
          shown.textContent = `added, in grey levels of 255: red ${shift[0].toFixed(1)}, green ${shift[1].toFixed(1)}, blue ${shift[2].toFixed(1)}`;
        };
        const set = alphas.map((_, k) => slider(side, `α${'₁₂₃'[k]}`, -data.reach[k], data.reach[k], data.reach[k]/100, 0,
          v => { alphas[k] = v; set[k](+v.toFixed(3)); draw(); }));
        const buttons = add(side, 'div', {style: 'display:flex;gap:.5rem;margin-top:.4rem'});
        const normal = () => Math.sqrt(-2*Math.log(1 - Math.random()))*Math.cos(2*Math.PI*Math.random());
        const give = (name, value) => add(buttons, 'button', {type: 'button'}, name).addEventListener('click',
          () => { alphas.forEach((_, k) => { alphas[k] = value(); set[k](+alphas[k].toFixed(3)); }); draw(); });
        give('as in training', () => data.std*normal());
        give('as it was', () => 0);
        side.append(shown);
        set.forEach(f => f(0));
        draw();
      });
    },

    votes() {                                                           // the crops of a photo, one after the other, and their average
      const row = add(root, 'div', {style: 'display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start'});
      const [w, h] = data.size, frame = add(row, 'div', {style: 'position:relative;width:min(100%,300px)'});
      add(frame, 'img', {src: data.photo, alt: data.label, style: 'width:100%;display:block'});
      const svg = add(frame, 'svg', {viewBox: `0 0 ${w} ${h}`, style: 'position:absolute;inset:0;width:100%;height:100%'});
      const side = add(row, 'div', {style: 'flex:1 1 18rem;min-width:0'});
      const bars = add(side, 'div'), said = add(side, 'div', {style: 'font-size:.85rem;margin-top:.4rem', 'aria-live': 'polite'});
      const best = p => p.reduce((k, v, i) => v > p[k] ? i : k, 0), colors = ['#0072B2', '#E69F00'];
      const mean = n => data.labels.map((_, k) => data.crops.slice(0, n).reduce((s, c) => s + c.probs[k], 0)/n), last = best(mean(data.crops.length));
      let set;
      const draw = n => {
        svg.replaceChildren();
        bars.replaceChildren();
        data.crops.slice(0, n).forEach((c, i) => add(svg, 'rect', {x: c.box[0], y: c.box[1], width: c.box[2], height: c.box[2], fill: 'none',
          stroke: colors[+(best(c.probs) != last)], 'stroke-width': (i == n - 1 ? 3 : .7)*w/300, 'stroke-opacity': i == n - 1 ? 1 : .5}));
        mean(n).map((p, k) => [p, k]).sort((a, b) => b[0] - a[0]).slice(0, 5).forEach(([p, k]) => {
          const line = add(bars, 'div', {style: 'display:grid;grid-template-columns:6rem 1fr 3.2rem;gap:.5rem;align-items:center;font-size:.9rem'});
          add(line, 'span', {}, data.labels[k]);
          const track = add(line, 'span', {style: 'background:rgba(128,128,128,.2);height:.8em'});
          add(track, 'span', {style: `display:block;height:100%;width:${100*p}%;background:${colors[+(k != last)]}`});
          add(line, 'span', {style: 'text-align:right'}, `${(100*p).toFixed(0)} %`);
        });
        const c = data.crops[n - 1], k = best(c.probs), agree = data.crops.slice(0, n).filter(d => best(d.probs) == last).length;
        said.textContent = `Crop ${n}, short side ${c.side}${c.mirrored ? ', mirrored' : ''}: ${data.labels[k]}, ${(100*c.probs[k]).toFixed(0)} %. ` +
          `Bars: the average of ${n == 1 ? 'this crop' : `crops 1 to ${n}`}; ${agree} of ${n} say ${data.labels[last]}.`;
        set(n);
      };
      set = slider(side, 'crops', 1, data.crops.length, 1, data.crops.length, v => draw(v));
      side.prepend(side.lastChild);
      draw(data.crops.length);
    },
  };
  kinds[kind]();
  // The still picture of the same cell is for places without JavaScript
  const cell = root.closest('.cell') || root.closest('.jp-OutputArea');
  for (const img of cell ? cell.querySelectorAll('img') : [])
    if (!root.contains(img)) (img.closest('.cell-output, .jp-OutputArea-child') || img).style.display = 'none';
}
