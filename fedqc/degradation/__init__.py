"""Turning reference labels into worse ones of exactly known quality: pure, label to label."""
