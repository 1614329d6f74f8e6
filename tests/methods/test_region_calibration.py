import numpy as np
import torch

from fedqc.methods.region_calibration import RegionCalibration


def test_each_region_has_a_map_of_its_own_from_the_labels_that_have_it() -> None:
    calibration = RegionCalibration(2)
    measured = np.array([[0.0, 0.1, 0.2], [0.5, 0.5, 0.2], [1.0, 0.9, 0.2]])
    dsc = np.array([[0.2, 0.4, 0.0], [0.6, 0.0, 0.0], [1.0, 0.8, 0.0]])
    present = np.array([[True, False], [False, False], [True, False]])
    calibration.fit(measured, dsc, present)
    found = calibration(torch.tensor([[0.25, 0.5, 0.33], [2.0, 0.0, 0.7]]))
    # The second region was never there: what is measured of it stays.
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6, 0.33], [1.0, 0.4, 0.7]]))


def test_the_sign_is_learned_where_it_may_be() -> None:
    measured = np.array([[0.0, 0.0], [1.0, 1.0]])
    dsc = np.array([[0.9, 0.1], [0.3, 0.7]])
    present = np.ones((2, 1), dtype=bool)
    calibration = RegionCalibration(1, learned_sign=True)
    calibration.fit(measured, dsc, present)
    torch.testing.assert_close(calibration(torch.tensor([[0.5, 0.5]])), torch.tensor([[0.6, 0.4]]))
