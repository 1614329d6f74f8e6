"""The ClientApp: wiring only. Every handler goes through the guard."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedqc.protocol import (
    CalibrateRequest,
    CrossCheckRequest,
    EvaluateSegmentationRequest,
    HandshakeRequest,
    ScoreRequest,
    SummariseRequest,
    TrainRequest,
    TrainSegmentationRequest,
    TrainSegmenterRequest,
)
from fedqc_client import tasks
from fedqc_client.guard import answer

app = ClientApp()


@app.query("handshake")
def handshake(message: Message, context: Context) -> Message:
    """Say who this site is and what it speaks."""
    return answer(message, context, HandshakeRequest, tasks.handshake)


@app.query("summarise")
def summarise(message: Message, context: Context) -> Message:
    """Check the site's cases and describe them."""
    return answer(message, context, SummariseRequest, tasks.summarise)


@app.train("segmenter")
def train_segmenter(message: Message, context: Context) -> Message:
    """Train a segmenter for one round, and keep the labels that it makes of references it never saw."""
    return answer(message, context, TrainSegmenterRequest, tasks.train_segmenter)


@app.train("qc")
def train(message: Message, context: Context) -> Message:
    """Train the QC model for one round."""
    return answer(message, context, TrainRequest, tasks.train)


@app.query("cross_check")
def cross_check(message: Message, context: Context) -> Message:
    """Have the references judged by a model that never saw them."""
    return answer(message, context, CrossCheckRequest, tasks.cross_check)


@app.query("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """Try the QC model on labels of known quality."""
    return answer(message, context, CalibrateRequest, tasks.calibrate)


@app.query("score")
def score(message: Message, context: Context) -> Message:
    """Score the site's candidates and decide."""
    return answer(message, context, ScoreRequest, tasks.score)


@app.train("segmentation")
def train_segmentation(message: Message, context: Context) -> Message:
    """Train the segmentation model for one round on what the site kept."""
    return answer(message, context, TrainSegmentationRequest, tasks.train_segmentation)


@app.evaluate("segmentation")
def evaluate_segmentation(message: Message, context: Context) -> Message:
    """Try the segmentation model on the references and keep it."""
    return answer(message, context, EvaluateSegmentationRequest, tasks.evaluate_segmentation)
