// The site can be read from its folder, where a browser starts no workers. There the search runs in a hidden frame in a worker's place.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.appendChild(frame);
      this.inside = frame.contentWindow;
      // The script calls these by the names that a worker has.
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = async (...scripts) => {
        for (const one of scripts) await this.load(one);
      };
      this.loaded = this.load(script);
    }

    load(script) {
      return new Promise((resolve, reject) => {
        const element = this.inside.document.createElement("script");
        element.src = script;
        element.onload = resolve;
        element.onerror = reject;
        this.inside.document.head.appendChild(element);
      });
    }

    async postMessage(data) {
      await this.loaded;
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
  window.Worker = window.IFrameWorker;
}
