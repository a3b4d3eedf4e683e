"""The Python API on one page: index photos, search them, look at what was found.

Run it as a script, `python docs/notebook.py [FOLDER]`, or cell by cell in an editor that knows
`# %%` (VS Code, PyCharm, Spyder); `jupytext --to notebook docs/notebook.py` makes a notebook of it.
Without a folder it uses the photos of `reir demo`. The gallery goes into the default store; the
environment variable REIR_STORE names another one.
"""

# %% Photos to search
import sys
from pathlib import Path

import reir

if len(sys.argv) > 1:
    photos = Path(sys.argv[1])
else:
    from reir.demo.gallery import PHOTOS

    photos = PHOTOS

# %% Index them. The second call finds nothing to do: only new and changed photos are encoded.
report = reir.index(photos, gallery="notebook")
print(f"{report.new} new photos, {report.instances} instances, {report.seconds:.1f} s")
report = reir.index(photos, gallery="notebook", progress=False)
print(f"{report.new} new, {report.unchanged} unchanged")

# %% What the store holds
for info in reir.galleries():
    print(info.name, info.num_images, "photos", info.num_instances, "instances")

# %% Search. A result is a sequence of hits, best first; a notebook shows it as drawn photos.
gallery = reir.open("notebook")
result = gallery.search("the man in a light blue shirt holding a frisbee", k=5)
print(result)
for hit in result:
    print(f"{hit.score:.3f}  {hit.likelihood}  {hit.path.name}  {hit.box_px}")

# %% Look at the best hit: the whole photo, and the box with a little of what is around it
best = result[0]
photo, crop = best.open(), best.crop(margin=0.1)
print("photo", photo.size, "crop", crop.size)
result.save_drawing("notebook.png")

# %% Filters, more hits of one photo, and "not like this"
from reir.query.request import Term  # noqa: E402 - imported where a reader needs it

large = gallery.search("a person", k=3, per_image=2, where="area > 0.02 and cx > 0.5")
other = gallery.search("a person", k=3, also=[Term(expression="a racket", weight=-0.5)])
print(len(large), "large persons on the right;", len(other), "persons without a racket")

# %% More like this, from an instance of the gallery or from a photo of your own
print(gallery.similar(best.instance_id, k=3))
print(gallery.similar(best.path, box=best.box, k=3))

# %% Where is it in this one photo? The photo does not have to be in the gallery.
for box in gallery.localize(best.path, "the man in a blue shirt", k=2).boxes:
    print(f"{box.score:.3f}", [round(side, 2) for side in box.box])

# %% Results as a table, if pandas is installed
print(result.to_pandas()[["rank", "score", "presence", "x1", "y1", "x2", "y2"]])

# %% The same methods over HTTP, for a server that `reir serve` runs:
# with reir.Client("http://127.0.0.1:8000") as client:
#     for hit in client.search("the man in a blue shirt", gallery="notebook", k=5):
#         hit.open().show()
gallery.close()
