"""The image of a predictor, guarded against threads that replace the images of each other."""

import dataclasses
import threading
from typing import Any

from jaxtyping import Array, Float

from sam_jax.predict.tiled_image import TiledImage


@dataclasses.dataclass(frozen=True, eq=False)
class SetImage:
    """An image that is set.

    Attributes:
      image: The image, or None until it is made from the other values.
      features: An embedding that was assigned, or None.
      original_size: (height, width) of the image, or None if it is unknown.
      input_size: (height, width) of the resized image on the canvas, or None if it is unknown.
      thread: The name of the thread that set it; empty if none did.
      token: Differs from that of every other image.
    """

    image: TiledImage | None = None
    features: Float[Array, "1 gh gw c"] | None = None
    original_size: tuple[int, int] | None = None
    input_size: tuple[int, int] | None = None
    thread: str = ""
    token: object = dataclasses.field(default_factory=object)


class ImageSlot:
    """Holds the image of a predictor.

    A thread that never set an image may use that of another thread. A thread whose image was
    replaced by another thread gets an error instead of predictions for the wrong image.

    Attributes:
      content: The image that is set; it is replaced, never changed.
    """

    def __init__(self) -> None:
        """Makes an empty slot."""
        self.content = SetImage()
        self._own = threading.local()  # `token`: of the image that this thread set last

    def change(self, **values: Any) -> None:
        """Replaces attributes of the image."""
        thread, token = threading.current_thread().name, object()
        self.content = dataclasses.replace(self.content, thread=thread, token=token, **values)
        self._own.token = token

    def get(self) -> SetImage:
        """Returns the image.

        Raises:
          RuntimeError: If this thread set an image, and another thread has set one since.
        """
        content = self.content
        if getattr(self._own, "token", content.token) is not content.token:
            raise RuntimeError(
                f"the image that this thread ({threading.current_thread().name}) set was replaced "
                f"by thread {content.thread}: a predictor has one image at a time. Make a "
                "SamPredictor for each thread, which share the variables, or use predict_batch"
            )
        return content

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for pickling and copying."""
        return {"content": self.content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or copied slot, whose image no thread has set."""
        vars(self).update(state, _own=threading.local())
